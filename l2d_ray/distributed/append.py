"""Growth of a dataset, with Ray: what is new becomes one more generation of files. `data.growth` has the rules.

The given interactions pass through the steps of a first preparation (`histories`). In between, a task for each block
reads the histories of the users that occur in it, from the row groups that hold them. Written are these users, whole.
"""

import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from l2d_ray.config import Config
from l2d_ray.data.catalogue import read_catalogue
from l2d_ray.data.dataset import Dataset, write_version
from l2d_ray.data.growth import grow_catalogue, latest_time, select_new
from l2d_ray.data.histories import held_lengths
from l2d_ray.data.sources import check_source
from l2d_ray.distributed.blocks import Blocks
from l2d_ray.distributed.histories import read_histories, select_core, surviving_items, without_empty, write_parts
from l2d_ray.distributed.job import root_error
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.screen import say
from l2d_ray.schema import Split
from l2d_ray.stages.settings import for_append
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class AppendResult:
    """Counts of the grown dataset, of what is new in it, and of what was given and did not enter."""

    version: int
    """Number of the version; the old one if nothing is new."""
    users: int
    items: int
    interactions: int
    samples: int
    new_users: int
    new_items: int
    new_interactions: int
    new_samples: int
    refused: dict[str, int]
    """Interactions that did not enter, by reason."""
    changed_titles: int
    """Items that were given with another title, which was not taken."""
    seconds: float
    dataset: str
    """Location of the dataset."""


@dataclass(frozen=True)
class _Step:
    """A dataset after one attempt, which is the one before if nothing is new."""

    dataset: Dataset
    refused: dict[str, int]
    changed_titles: int


def append(config: Config) -> AppendResult:
    """Add the interactions and items of `config.data` to the dataset in `config.workspace`, as its next version.

    If another run makes that version first, this one starts again from it. Raises InputError if there is no dataset, if
    it cannot grow, and for input that is missing, malformed or contradicts its settings.
    """
    started, workspace = time.monotonic(), Workspace.open(config.workspace)
    while True:
        old = Dataset.open(workspace)
        try:
            step = _append(for_append(config, old), old)
            break
        except FileExistsError:
            say(f"another run made version {old.version.number + 1} of the dataset meanwhile; starting again from it")
        except RayError as error:
            raise root_error(error) from None
    new = step.dataset
    before, after = _counts(old), _counts(new)
    if step.refused:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in step.refused.items())
        say(f"did not enter: {reasons}; cluster/README.md explains the reasons (Keep it fresh)")
    if new is old:
        say(f"nothing is new; the dataset stays at version {old.version.number}")
    return AppendResult(
        version=new.version.number,
        **after,
        **{f"new_{name}": after[name] - before[name] for name in after},
        refused=step.refused,
        changed_titles=step.changed_titles,
        seconds=round(time.monotonic() - started, 3),
        dataset=workspace.path("dataset"),
    )


def _append(config: Config, dataset: Dataset) -> _Step:
    """Write the next version. Raises FileExistsError if another run wrote it first."""
    check_source(config)
    items = dataset.items()
    known = len(items)
    catalogue, changed_titles = grow_catalogue(items, read_catalogue(config))
    blocks, refused = read_histories(config, catalogue, latest_time(islice(dataset.iter_users(), 1)))
    blocks, not_new = _select_new(blocks, dataset)
    blocks, refused["k_core"] = select_core(blocks, len(catalogue), config.data.min_interactions, known)
    blocks = without_empty(blocks)
    refused = {reason: count for reason, count in (refused | not_new).items() if count}
    if not blocks.refs:
        return _Step(dataset, refused, changed_titles)
    items, new_index = surviving_items(blocks, catalogue, known)
    new_users = sum(blocks.ask("count new users", _num_new_users))
    version = dataset.version.number + 1
    parts = write_parts(blocks, dataset.workspace, new_index, config.data.split, version=version)
    grown = write_version(dataset, items.slice(known), new_users, parts, refused, changed_titles)
    return _Step(grown, refused, changed_titles)


def _select_new(blocks: Blocks, dataset: Dataset) -> tuple[Blocks, dict[str, int]]:
    """Return what is new, block by block, and the number of the other interactions by reason."""
    task, shared = ray.remote(num_returns=2)(_select_new_in), ray.put(dataset)
    results = [task.remote(ref, shared) for ref in blocks.refs]
    with Progress(None, "compare with the dataset"):
        counts = ray.get([count for _, count in results])
    return Blocks([block for block, _ in results]), {name: sum(of[name] for of in counts) for name in counts[0]}


def _counts(dataset: Dataset) -> dict[str, int]:
    """Return the counts of a dataset in which all samples train: each interaction is one, but a user's first."""
    users, samples = dataset.num_users, dataset.num_samples(Split.TRAIN)
    return {"users": users, "items": len(dataset.items()), "interactions": users + samples, "samples": samples}


# The functions below run in tasks, on one block.


def _select_new_in(block: pa.Table, dataset: Dataset) -> tuple[pa.Table, dict[str, int]]:
    held = dataset.find_users(block["user_id"].combine_chunks(), block["user_hash"].to_numpy())
    return select_new(block, held)


def _num_new_users(block: pa.Table) -> int:
    return int(np.count_nonzero(held_lengths(block) == 0))
