"""The parts that recommenders are made from."""

from collections.abc import Collection, Mapping
from functools import cached_property

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import TrainingPairs, training_pairs
from l2d_ray.encoding import HistoryEncoder, language_model
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.models.backbone import LanguageModel
from l2d_ray.recommenders.contract import IndexKey, Need
from l2d_ray.recommenders.trained import Trained
from l2d_ray.workspace import Workspace


class Resources:
    """Parts of a workspace, and the model. Each is loaded when it is first used, and then kept.

    Only the parts in `needs` may be used.
    """

    def __init__(self, config: Config, needs: Collection[Need], indexes: Mapping[IndexKey, str]) -> None:
        """Load nothing yet. `indexes` has the path of each index's manifest in the workspace."""
        self.config = config
        self._needs, self._paths = needs, indexes
        self._workspace = Workspace.open(config.workspace)
        self._dataset = Dataset.open(self._workspace)
        self._indexes: dict[tuple[IndexKey, float], ShardedIndex] = {}

    @cached_property
    def titles(self) -> list[str]:
        """The title of each item."""
        titles: list[str] = self._dataset.items()["title"].to_pylist()
        return titles

    @cached_property
    def training_pairs(self) -> TrainingPairs:
        """The last item and the target of every training sample."""
        self._check(Need.TRAINING_PAIRS)
        return training_pairs(self._dataset)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model with its head. Raises InputError if the model has no head."""
        self._check(Need.LANGUAGE_MODEL)
        return language_model(self.config)

    @cached_property
    def encoder(self) -> HistoryEncoder:
        """The encoder of histories. It shares the language model's weights where that is needed, too."""
        self._check(Need.ENCODER)
        backbone = self.language_model.backbone if Need.LANGUAGE_MODEL in self._needs else None
        return HistoryEncoder(self.config, self.titles, backbone)

    def trained(self, name: str) -> Trained:
        """Return the weights that jobs/train.py left. Raises InputError as `Trained.load` does."""
        self._check(Need.TRAINED)
        return Trained.load(self._dataset, name)

    def index(self, key: IndexKey, prior: float = 0.0) -> ShardedIndex:
        """Return an index whose L2D-G has this prior."""
        self._check(Need.INDEX)
        if (key, prior) not in self._indexes:
            self._indexes[key, prior] = (
                self.index(key).with_prior(prior) if prior else ShardedIndex.open(self._workspace, self._paths[key])
            )
        return self._indexes[key, prior]

    def _check(self, need: Need) -> None:
        if need not in self._needs:
            raise LookupError(f"{need} is used by a recommender whose declaration does not list it in `needs`")
