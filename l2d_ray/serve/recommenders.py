"""The recommenders next to L2D that are served: which may be, what decides their answers, and how they are made.

They are made from the dataset and from `recommenders/`, either of which may be replaced in a workspace that is served.
A release therefore records what it was planned with.
"""

from collections.abc import Iterable, Mapping

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import MODEL_NEEDS, IndexKey, Recommender
from l2d_ray.recommenders.fused import read_fusion
from l2d_ray.recommenders.registry import NamedRecommender, find
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.workspace import Workspace

L2D = "l2d"
"""Name of L2D among the served recommenders."""
SETTING = "serve.recommender"


def find_served(name: str, config: Config, setting: str = SETTING) -> NamedRecommender:
    """Return the recommender of a name, which `setting` holds.

    Raises InputError if the name is unknown or is one of L2D, and for a recommender that cannot be served.
    """
    if name.partition("-")[0] == L2D:
        raise InputError(f"{setting}={name!r}: L2D is served in any case; leave it out")
    named = find(name, config, setting)
    declared = named.declaration
    for refused, reason in (
        (declared.writes_text, "writes text, which takes seconds"),
        (declared.samples_only, "has lists for the samples of an evaluation only"),
        ({*named.options.indexes} - {served_index(config)}, "searches another index than the endpoint"),
    ):
        if refused:
            raise InputError(f"{setting}={name!r}: cannot be served, because it {reason}; leave it out")
    return named


def served_index(config: Config) -> IndexKey:
    """Return the index that L2D searches."""
    return IndexKey(config.index.space)


def runs_model(names: Iterable[str], config: Config) -> bool:
    """Return whether one of these recommenders needs the language model."""
    return any(find_served(name, config).needs & MODEL_NEEDS for name in names)


def served_weights(names: Iterable[str], config: Config, dataset: str) -> dict[str, str]:
    """Return these recommenders, each with the checksum of its weights (`weights_of`).

    `dataset` is the digest of the dataset of the memory that is served. Raises InputError for another dataset in the
    workspace, for a name that cannot be served, for one that was trained with another language model, and as
    `weights_of` does.
    """
    named = [find_served(name, config) for name in dict.fromkeys(names)]
    if not named:
        return {}
    found = Dataset.open(Workspace.open(config.workspace))
    if found.digest != dataset:
        raise InputError(
            f"{found.workspace.path('dataset')}: is not the dataset of the memory, so {named[0].name} cannot be served;"
            f" run jobs/build_memory.py and jobs/build_index.py, or leave {SETTING} out"
        )
    weights = {one.name: weights_of(one, found, config) for one in named}
    for one in named:
        one.options.check_model(config, found)
    return weights


def weights_of(named: NamedRecommender, dataset: Dataset, config: Config) -> str:
    """Return the checksum of a recommender's weights, or of the record of a fusion; empty if it has none.

    Raises InputError if it was not trained or fitted yet, or on another dataset, or if it cannot be made from this one.
    """
    named.options.check(dataset, [])
    if named.options.parts:
        return read_fusion(named.options, dataset, _indexes(named, config)).digest()
    return named.checksum(dataset)


def make(named: NamedRecommender, config: Config) -> Recommender:
    """Make a recommender of parts that it shares with no other. Raises InputError if weights are missing or damaged."""
    from l2d_ray.recommenders.resources import Resources  # not above: it imports PyTorch

    return named.make(Resources(config, named.needs, _indexes(named, config)))


def _indexes(named: NamedRecommender, config: Config) -> Mapping[IndexKey, str]:
    """Return the path of the manifest of the served index, if a recommender searches it, too."""
    return {key: plan_index(config).manifest for key in named.options.indexes}
