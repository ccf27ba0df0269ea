"""Items without interactions for a workspace that has an index: a version of the dataset, a snapshot and an index.

The new snapshot has the rows of the one before, and of what the dataset got meanwhile. So the model runs the new titles
and the validation samples alone. Every step leaves files, and the same command continues from them.
"""

import time
from dataclasses import dataclass

from l2d_ray.config import Config
from l2d_ray.data.additions import read_new_items
from l2d_ray.data.dataset import Dataset, write_version
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.screen import say
from l2d_ray.stages.settings import for_items
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class AddItemsResult:
    """The catalogue after items were added, and the index that has them."""

    version: int
    """Number of the version of the dataset; the old one if nothing is new."""
    items: int
    """Number of items in the catalogue."""
    new_items: int
    snapshot: int
    """Number of the snapshot of the memory."""
    index: str
    """Location of the manifest of the index."""
    seconds: float


def add_items(config: Config) -> AddItemsResult:
    """Add the items of `data.items` to the dataset, the memory and the index of a workspace.

    Raises InputError as `checks.add_items` does.
    """
    started, workspace = time.monotonic(), Workspace.open(config.workspace)
    dataset, new_items = _add(config, workspace)
    if not new_items:
        say(f"nothing is new; the dataset stays at version {dataset.version.number}")
    rest = config.replace({"data": {}})
    snapshot, index = build_memory(rest).snapshot, build_index(rest).index
    return AddItemsResult(
        version=dataset.version.number,
        items=len(dataset.items()),
        new_items=new_items,
        snapshot=snapshot,
        index=index,
        seconds=round(time.monotonic() - started, 3),
    )


def _add(config: Config, workspace: Workspace) -> tuple[Dataset, int]:
    """Return the dataset with the items of `data.items`, and the number of new ones.

    If another run makes the next version first, this one starts again from it.
    """
    while True:
        dataset = Dataset.open(workspace)
        new = read_new_items(for_items(config, dataset), dataset.items())
        if not len(new):
            return dataset, 0
        try:
            return write_version(dataset, new, 0, [], refused={}, changed_titles=0), len(new)
        except FileExistsError:
            say(f"another run made version {dataset.version.number + 1} of the dataset; starting again from it")
