"""The parts that recommenders are made from."""

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from l2d_ray.config import Config, FinetuneConfig
from l2d_ray.core.arrays import FloatArray, IntArray
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import TrainingInteractions, first_times, training_interactions
from l2d_ray.encoding import HistoryEncoder, language_model
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.recommenders.contract import IndexKey, Need, Recommender
from l2d_ray.recommenders.registry import NamedRecommender
from l2d_ray.recommenders.trained import Trained
from l2d_ray.workspace import Workspace

if TYPE_CHECKING:
    from l2d_ray.models.backbone import LanguageModel

PartT = TypeVar("PartT")


class Resources:
    """Parts of a workspace, and the model. Each is loaded when it is first used, and then kept.

    Only the parts in `needs` may be used.
    """

    def __init__(self, config: Config, needs: Collection[Need], indexes: Mapping[IndexKey, str]) -> None:
        """Load nothing yet. `indexes` has the path of each index's manifest in the workspace."""
        self.config = config
        self._needs, self.indexes = needs, indexes
        self._workspace = Workspace.open(config.workspace)
        self.dataset = Dataset.open(self._workspace)
        self._indexes: dict[tuple[IndexKey, float], ShardedIndex] = {}
        self._derived: dict[Any, Any] = {}
        self._made: dict[NamedRecommender, Recommender] = {}

    @cached_property
    def titles(self) -> list[str]:
        """The title of each item."""
        titles: list[str] = self.dataset.items()["title"].to_pylist()
        return titles

    @cached_property
    def item_ids(self) -> list[str]:
        """The id of each item."""
        item_ids: list[str] = self.dataset.items()["item_id"].to_pylist()
        return item_ids

    @cached_property
    def first_times_I(self) -> IntArray:
        """The time of the first interaction with each item, of any split (`samples.first_times`)."""
        return first_times(self.dataset)

    @cached_property
    def training_interactions(self) -> TrainingInteractions:
        """The items of all users up to their last training targets."""
        self._check(Need.TRAINING_INTERACTIONS)
        return training_interactions(self.dataset)

    @cached_property
    def language_model(self) -> "LanguageModel":
        """The language model with its head. Raises InputError if the model has no head."""
        self._check(Need.LANGUAGE_MODEL)
        return language_model(self.config)

    @property
    def encoder(self) -> HistoryEncoder:
        """The encoder of histories. It shares the language model's weights where that is needed, too."""
        self._check(Need.ENCODER)
        return self._encoder

    @cached_property
    def title_states_ID(self) -> FloatArray:
        """The hidden state of each item's title alone, float32."""
        self._check(Need.TITLE_STATES)
        return self._encoder.title_states(len(self.titles))

    @cached_property
    def _encoder(self) -> HistoryEncoder:
        backbone = self.language_model.backbone if Need.LANGUAGE_MODEL in self._needs else None
        return HistoryEncoder(self.config, self.titles, backbone)

    def trainable_model(self, finetune: FinetuneConfig, num_layers: int) -> Any:
        """Load a language model that no other recommender shares (`load_trainable_body`)."""
        from l2d_ray.models.trainable import load_trainable_body  # imports transformers, which takes seconds

        self._check(Need.TRAINABLE_MODEL)
        return load_trainable_body(self.config.model, finetune, self.config.device, num_layers)

    def trained(self, name: str) -> Trained:
        """Return the weights that jobs/train.py left. Raises InputError as `Trained.load` does."""
        self._check(Need.TRAINED)
        return Trained.load(self.dataset, name)

    def index(self, key: IndexKey, prior: float = 0.0) -> ShardedIndex:
        """Return an index whose L2D-G has this prior."""
        self._check(Need.INDEX)
        if (key, prior) not in self._indexes:
            self._indexes[key, prior] = self.index(key).with_prior(prior) if prior else self._open_index(key)
        return self._indexes[key, prior]

    def _open_index(self, key: IndexKey) -> ShardedIndex:
        return ShardedIndex.open(self._workspace, self.indexes[key])

    def recommender(self, named: NamedRecommender) -> Recommender:
        """Make a recommender from these parts, or return the one that was made before."""
        if named not in self._made:
            self._made[named] = named.make(self)
        return self._made[named]

    def once(self, derive: Callable[["Resources"], PartT]) -> PartT:
        """Return `derive(self)`, which is computed at the first call only: a part that several recommenders share."""
        if derive not in self._derived:
            self._derived[derive] = derive(self)
        part: PartT = self._derived[derive]
        return part

    def _check(self, need: Need) -> None:
        if need not in self._needs:
            raise LookupError(f"{need} is used by a recommender whose declaration does not list it in `needs`")
