"""The cost of recommenders before their first query: seconds of preparation, and bytes on the disk.

Seconds are read from what the stages recorded, over all attempts and workers: training, and the memory and the index
that L2D searches. Recommenders that count have none: they are fitted within seconds, whenever they are loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from l2d_ray.config import Config
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.memory.store import MemoryStore
from l2d_ray.models.checkpoint import find_adapter, find_model
from l2d_ray.recommenders.contract import MODEL_NEEDS, IndexKey, Need
from l2d_ray.recommenders.registry import MODULES, NamedRecommender
from l2d_ray.recommenders.trained import TrainingRecord, folder_of, record_of
from l2d_ray.stages.finetuning import Training
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes, which add up."""

    training_seconds: float = 0.0
    """Seconds of work before the first query."""
    bytes: int = 0
    """Bytes on the disk that the recommender is loaded from."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(round(self.training_seconds + other.training_seconds, 3), self.bytes + other.bytes)


def costs_of(
    recommenders: Sequence[NamedRecommender], config: Config, indexes: Mapping[IndexKey, str]
) -> dict[str, Cost]:
    """Return the cost of each recommender, by name, except for those that are files of another system.

    `indexes` has the path of each index's manifest.
    """
    workspace = Workspace.open(config.workspace)
    searched = {key for one in recommenders for key in one.options.indexes}
    cost_of_index = {key: _index(workspace, indexes[key]) for key in searched}
    needed = {need for one in recommenders for need in one.needs}
    model = _model(config) if needed & MODEL_NEEDS else Cost()
    counted = Cost(bytes=_bytes(workspace, "dataset/histories"))
    costs = {}
    for one in recommenders:
        if one.module == MODULES["file"]:
            continue
        needs = one.needs
        parts = [cost_of_index[key] for key in one.options.indexes]
        if needs & MODEL_NEEDS:
            parts.append(model)
        if Need.TRAINING_INTERACTIONS in needs:
            parts.append(counted)
        for part in one.options.parts or [one]:
            if Need.TRAINED in part.needs:
                parts.append(_trained(workspace, part.name))
        costs[one.name] = sum(parts, Cost())
    return costs


def _model(config: Config) -> Cost:
    """Return the cost of the language model: the bytes of its weights, and the seconds of its fine-tuning."""
    cost = Cost()
    for checkpoint in filter(None, (find_model(config.model), find_adapter(config.model))):
        folder = Workspace.open(str(checkpoint.folder))
        tuned = folder.exists("training.json")
        seconds = Training.read(folder, "training.json").seconds if tuned else 0.0
        cost += Cost(seconds, sum(file.stat().st_size for file in checkpoint.files))
    return cost


def _index(workspace: Workspace, path: str) -> Cost:
    """Return the cost of an index, and the seconds of the memory that it is made from."""
    manifest = IndexManifest.read(workspace, path)
    store = MemoryStore(workspace)
    units, records = store.snapshot(manifest.snapshot).units, store.units()
    files = [manifest.fitted.map, *(file for shard in manifest.shards for file in shard.all_files())]
    seconds = manifest.seconds + sum(records[unit].seconds for unit in units)
    return Cost(seconds, sum(file.bytes for file in files))


def _trained(workspace: Workspace, name: str) -> Cost:
    """Return the cost of a recommender that jobs/train.py trained."""
    record = TrainingRecord.read(workspace, record_of(name))
    return Cost(record.seconds, _bytes(workspace, folder_of(name)))


def _bytes(workspace: Workspace, folder: str) -> int:
    """Return the bytes of all files below a folder."""
    paths = [workspace.path(path) for path in workspace.files(folder)]
    return sum(info.size for info in workspace.filesystem.get_file_info(paths))
