"""Raw interactions to histories in blocks, and from there to the parts of a dataset, with Ray.

Tasks stream the files and keep interactions with known items that have a title. One sort by the hash of the user (Ray
Data, which spills to disk) brings all interactions of a user into one block. Every later step is one task per block
with a small result. The driver holds the items and a few numbers for each, never the interactions. The result does not
depend on the number of blocks, the number of workers or their timing.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data.catalogue import Catalogue, Rejection
from l2d_ray.data.dataset import write_part
from l2d_ray.data.files import size
from l2d_ray.data.generations import Part
from l2d_ray.data.histories import (
    Lists,
    as_lists,
    group,
    held_lengths,
    item_counts,
    num_interactions,
    occurring_items,
    range_boundaries,
    renumber,
    select,
)
from l2d_ray.data.interactions import read, take_tallies
from l2d_ray.data.sources import PublishedSource, source_of
from l2d_ray.data.splits import Cut, by_time, everything, leave_one_out
from l2d_ray.distributed.blocks import Blocks
from l2d_ray.distributed.progress import Progress
from l2d_ray.schema import HISTORIES, ITEMS
from l2d_ray.workspace import Workspace

_BYTES_PER_BLOCK = 64 << 20


def read_histories(config: Config, catalogue: Catalogue, latest: int | None = None) -> tuple[Blocks, dict[str, int]]:
    """Read the files and return the histories of all users, and the number of dropped interactions by reason.

    Interactions later than `latest` are dropped.
    """
    source = source_of(config)
    files = source.interaction_files(config)
    parts = config.data.num_blocks or -(-sum(size(path) for path in files) // _BYTES_PER_BLOCK)
    shared = ray.put(catalogue)
    rows = [{"path": path, "file": number} for number, path in enumerate(files)]
    reader = partial(_read, config=config, catalogue=shared, latest=latest)
    with Progress(None, "read and bring users together"):
        # With boundaries, the sort neither samples nor splits: block b is the b-th range. It needs at least two.
        sorted_by_user = (
            ray.data.from_items(rows, override_num_blocks=len(files))
            .map_batches(reader, batch_size=1, batch_format="pyarrow")
            .sort("user_hash", boundaries=range_boundaries(max(parts, 2)))
            .materialize()
        )
    blocks = Blocks(sorted_by_user.to_arrow_refs())
    # Tallies are in the first block, because they have the smallest hash.
    tallies = Blocks(blocks.refs[:1]).ask("count", _tallies)[0]
    dropped = {Rejection(reason).name.lower(): count for reason, count in sorted(tallies.items())}
    if isinstance(source, PublishedSource):
        return blocks.map(_group_published, config, shared, files), dropped
    return blocks.map(_group), dropped


def select_core(blocks: Blocks, candidates: int, k: int, known: int = 0) -> tuple[Blocks, int]:
    """Return the k-core, and the number of interactions that are not in it.

    The first `known` candidates stay in it, whatever their number, and so do users with held interactions.
    """
    before = sum(blocks.ask("make histories", num_interactions))
    stays = np.ones(candidates, dtype=np.bool_)
    for iteration in count(1):
        shared, counts = ray.put(stays), np.zeros(candidates, dtype=np.int64)
        for _, (items, found) in blocks.stream(f"{k}-core, pass {iteration}", item_counts, shared, k):
            counts[items] += found
        passes = counts >= k
        passes[:known] = True
        if np.array_equal(stays, passes):
            return blocks.map(select, shared, k), before - int(counts.sum())
        stays = passes
    raise AssertionError("unreachable")


def without_empty(blocks: Blocks) -> Blocks:
    """Return the blocks that have a user."""
    users = blocks.ask("count users", num_users)
    return Blocks([ref for ref, number in zip(blocks.refs, users, strict=True) if number])


def surviving_items(blocks: Blocks, catalogue: Catalogue, known: int = 0) -> tuple[pa.Table, NDArray[np.int32]]:
    """Return the items that occur and the first `known` candidates, and [candidates] the indices, -1 for the others.

    Items are in the order of the candidates.
    """
    occurs = np.zeros(len(catalogue), dtype=np.bool_)
    occurs[:known] = True
    for _, items in blocks.stream("count items", occurring_items):
        occurs[items] = True
    candidates = np.flatnonzero(occurs)
    new_index = np.full(len(catalogue), -1, dtype=np.int32)
    new_index[candidates] = np.arange(len(candidates))
    rows = pa.array(candidates)
    columns = [new_index[candidates], catalogue.item_ids.take(rows), catalogue.titles.take(rows)]
    return pa.table(columns, schema=ITEMS), new_index


def write_parts(
    blocks: Blocks,
    workspace: Workspace,
    new_index: NDArray[np.int32],
    split: str,
    cuts: list[list[Cut]] | None = None,
    version: int = 1,
) -> list[tuple[Part, int]]:
    """Write a part for each block, as `dataset.write_part` does. `cuts` are those of each block, for data.split=time.

    A held interaction has the split NONE. The split of a published source stays.
    """
    numbered = list(enumerate(cuts or [[]] * len(blocks.refs)))
    return blocks.ask("write", _write, workspace.uri, ray.put(new_index), split, version, each=numbered)


def num_users(block: pa.Table) -> int:
    """Return the number of users of a block."""
    return len(block)


# The functions below run in tasks, on one block.


def _read(batch: pa.Table, config: Config, catalogue: Any, latest: int | None) -> Iterator[pa.Table]:
    """Yield the chunks of the files that the rows name."""
    for row in batch.to_pylist():
        yield from read(row["path"], row["file"], config, ray.get(catalogue), latest)


def _tallies(block: pa.Table) -> dict[int, int]:
    return take_tallies(block)[1]


def _group(block: pa.Table) -> pa.Table:
    return group(take_tallies(block)[0])


def _group_published(block: pa.Table, config: Config, catalogue: Catalogue, files: Sequence[str]) -> pa.Table:
    source = source_of(config)
    assert isinstance(source, PublishedSource)
    return source.group(take_tallies(block)[0], catalogue.find, files)


def _write(
    block: pa.Table,
    numbered: tuple[int, list[Cut]],
    workspace: str,
    new_index: NDArray[np.int32],
    split: str,
    version: int,
) -> tuple[Part, int]:
    number, cuts = numbered
    items, times = Lists.of(block["item_indices"]), Lists.of(block["timestamps"])
    if "splits" in block.column_names:
        splits = block["splits"]
    else:
        rules = {
            "time": lambda: by_time(times, cuts),
            "leave-one-out": lambda: leave_one_out(times),
            "none": lambda: everything(times, held_lengths(block)),
        }
        splits = as_lists(times.offsets, rules[split](), pa.int8())
    histories = pa.table(
        [
            block["user_id"],
            block["user_hash"],
            as_lists(items.offsets, renumber(items.values, new_index), pa.int32()),
            block["timestamps"],
            splits,
        ],
        schema=HISTORIES,
    )
    return write_part(Workspace.open(workspace), number, histories, version)
