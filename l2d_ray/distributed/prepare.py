"""Raw interactions to a dataset, with Ray.

Tasks stream the files and keep interactions with known items that have a title. One sort by the hash of the user (Ray
Data, which spills to disk) brings all interactions of a user into one block.

Every later step is one task per block with a small result. The steps are passes of the k-core, passes that find the
cuts of the time split, and the writing of a part. The driver holds the items and a few numbers for each, never the
interactions. The result does not depend on the number of blocks, the number of workers or their timing.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from l2d_ray.config import Config
from l2d_ray.data.catalogue import Catalogue, Rejection, read_catalogue
from l2d_ray.data.dataset import Part, write_manifest, write_part
from l2d_ray.data.files import size
from l2d_ray.data.histories import Lists, as_lists, group, item_counts, range_boundaries, select
from l2d_ray.data.interactions import read, take_tallies
from l2d_ray.data.sources import PublishedSource, check_source, source_of
from l2d_ray.data.splits import SHARES, Cut, by_time, find_cut, histogram, leave_one_out, share_ties, target_times
from l2d_ray.distributed.blocks import Blocks
from l2d_ray.distributed.job import root_error
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.screen import say
from l2d_ray.errors import InputError
from l2d_ray.schema import HISTORIES, ITEMS
from l2d_ray.workspace import Workspace

_BYTES_PER_BLOCK = 64 << 20


@dataclass(frozen=True)
class PrepareResult:
    """Counts of the dataset, and of the interactions that were left out."""

    users: int
    items: int
    interactions: int
    samples: int
    train: int
    valid: int
    test: int
    dropped: dict[str, int]
    """Interactions that were left out, by reason."""
    seconds: float
    dataset: str
    """Location of the dataset."""


def prepare(config: Config) -> PrepareResult:
    """Read, filter, split and write the dataset of `config.data` into `config.workspace`.

    Raises InputError for input that is missing or malformed, and when the filters leave nothing.
    """
    started = time.monotonic()
    check_source(config)
    workspace, published = Workspace.open(config.workspace), isinstance(source_of(config), PublishedSource)
    try:
        catalogue = read_catalogue(config)
        blocks, dropped = _histories(config, catalogue)
        if not published:
            blocks, dropped["k_core"] = _core(blocks, len(catalogue), config.data.min_interactions)
        if config.data.max_users is not None:
            blocks, dropped["max_users"] = _first_users(blocks, config.data.max_users)
        dropped = {reason: count for reason, count in dropped.items() if count}
        blocks = _without_empty(blocks)
        if not blocks.refs:
            raise InputError(_nothing_left(config, dropped))
        items, new_index = _surviving_items(blocks, catalogue)
        cuts = _cuts(blocks) if config.data.split == "time" and not published else None
        parts = _write_parts(blocks, workspace, new_index, cuts)
    except RayError as error:
        raise root_error(error) from None
    about = {"data": config.data.model_dump(mode="json"), **_counts(items, parts), "dropped": dropped}
    manifest = write_manifest(workspace, items, parts, about)
    _warn_if_few_are_kept(manifest["interactions"], dropped)
    seconds = round(time.monotonic() - started, 3)
    return PrepareResult(**_counts(items, parts), dropped=dropped, seconds=seconds, dataset=workspace.path("dataset"))


def _warn_if_few_are_kept(kept: int, dropped: dict[str, int]) -> None:
    """Tell the user if filters dropped most interactions. Those that `data.max_users` left out count as kept."""
    filtered = {reason: count for reason, count in dropped.items() if reason != "max_users"}
    kept += dropped.get("max_users", 0)
    total = kept + sum(filtered.values())
    if kept < total / 2:
        reasons = ", ".join(f"{count:,} by {reason}" for reason, count in filtered.items())
        say(
            f"the filters keep {kept:,} of {total:,} interactions; dropped: {reasons}; data.min_interactions and"
            " data.max_title_words decide how many"
        )


def _histories(config: Config, catalogue: Catalogue) -> tuple[Blocks, dict[str, int]]:
    """Read the files and return the histories of all users, and the number of dropped interactions by reason."""
    source = source_of(config)
    files = source.interaction_files(config)
    parts = config.data.num_blocks or -(-sum(size(path) for path in files) // _BYTES_PER_BLOCK)
    shared = ray.put(catalogue)
    rows = [{"path": path, "file": number} for number, path in enumerate(files)]
    with Progress(None, "read and bring users together"):
        # With boundaries, the sort neither samples nor splits: block b is the b-th range. It needs at least two.
        sorted_by_user = (
            ray.data.from_items(rows, override_num_blocks=len(files))
            .map_batches(partial(_read, config=config, catalogue=shared), batch_size=1, batch_format="pyarrow")
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


def _core(blocks: Blocks, candidates: int, k: int) -> tuple[Blocks, int]:
    """Return the k-core, and the number of interactions that are not in it."""
    before = sum(blocks.ask("make histories", _num_interactions))
    stays = np.ones(candidates, dtype=np.bool_)
    for iteration in count(1):
        shared, counts = ray.put(stays), np.zeros(candidates, dtype=np.int64)
        for _, (items, found) in blocks.stream(f"{k}-core, pass {iteration}", item_counts, shared, k):
            counts[items] += found
        if np.array_equal(stays, counts >= k):
            return blocks.map(select, shared, k), before - int(counts.sum())
        stays = counts >= k
    raise AssertionError("unreachable")


def _first_users(blocks: Blocks, max_users: int) -> tuple[Blocks, int]:
    """Return the first `max_users` users, and the number of interactions of the others."""
    users = np.array(blocks.ask("count users", _num_users))
    quotas = np.clip(max_users - (np.cumsum(users) - users), 0, users).tolist()
    before = sum(blocks.ask("count interactions", _num_interactions))
    first = blocks.map(_head, each=quotas)
    return first, before - sum(first.ask("count interactions", _num_interactions))


def _without_empty(blocks: Blocks) -> Blocks:
    users = blocks.ask("count users", _num_users)
    return Blocks([ref for ref, number in zip(blocks.refs, users, strict=True) if number])


def _surviving_items(blocks: Blocks, catalogue: Catalogue) -> tuple[pa.Table, NDArray[np.int32]]:
    """Return the items that occur, in the order of their file, and [candidates] their indices, -1 for the others."""
    occurs = np.zeros(len(catalogue), dtype=np.bool_)
    for _, items in blocks.stream("count items", _items):
        occurs[items] = True
    candidates = np.flatnonzero(occurs)
    new_index = np.full(len(catalogue), -1, dtype=np.int32)
    new_index[candidates] = np.arange(len(candidates))
    rows = pa.array(candidates)
    columns = [new_index[candidates], catalogue.item_ids.take(rows), catalogue.titles.take(rows)]
    return pa.table(columns, schema=ITEMS), new_index


def _cuts(blocks: Blocks) -> list[list[Cut]]:
    """Return the two cuts of the time split, for each block."""
    spans = blocks.ask("find the period", _span)
    samples = sum(number for number, _, _ in spans)
    if samples == 0:
        return [[] for _ in spans]
    low = min(first for number, first, _ in spans if number)
    high = max(last for number, _, last in spans if number)

    def count_in_bins(start: int, width: int) -> NDArray[np.int64]:
        return reduce(np.add, (part for _, part in blocks.stream("find the cuts", _histogram, start, width)))

    cuts = [find_cut(int(share * samples), low, high, count_in_bins) for share in SHARES]
    tied = [blocks.ask("share ties", _num_at, cut.at) for cut in cuts]
    shared = [share_ties(cut, numbers) for cut, numbers in zip(cuts, tied, strict=True)]
    return [list(of_block) for of_block in zip(*shared, strict=True)]


def _write_parts(
    blocks: Blocks, workspace: Workspace, new_index: NDArray[np.int32], cuts: list[list[Cut]] | None
) -> list[tuple[Part, int]]:
    numbered = list(enumerate(cuts or [None] * len(blocks.refs)))
    return blocks.ask("write", _write, workspace.uri, ray.put(new_index), each=numbered)


def _counts(items: pa.Table, parts: Sequence[tuple[Part, int]]) -> dict[str, int]:
    samples = {name: sum(part.samples[name] for part, _ in parts) for name in ("train", "valid", "test")}
    return {
        "users": sum(part.users for part, _ in parts),
        "items": len(items),
        "interactions": sum(part.interactions for part, _ in parts),
        "samples": sum(samples.values()),
        **samples,
    }


def _nothing_left(config: Config, dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason} {number}" for reason, number in dropped.items()) or "nothing was read"
    return (
        f"data.interactions={config.data.interactions!r}: no interactions left after filtering (dropped: {reasons});"
        f" check data.items, lower data.min_interactions={config.data.min_interactions} or widen data.since and"
        " data.until"
    )


# The functions below run in tasks, on one block.


def _read(batch: pa.Table, config: Config, catalogue: Any) -> Iterator[pa.Table]:
    """Yield the chunks of the files that the rows name."""
    for row in batch.to_pylist():
        yield from read(row["path"], row["file"], config, ray.get(catalogue))


def _tallies(block: pa.Table) -> dict[int, int]:
    return take_tallies(block)[1]


def _group(block: pa.Table) -> pa.Table:
    return group(take_tallies(block)[0])


def _group_published(block: pa.Table, config: Config, catalogue: Catalogue, files: Sequence[str]) -> pa.Table:
    source = source_of(config)
    assert isinstance(source, PublishedSource)
    return source.group(take_tallies(block)[0], catalogue.find, files)


def _num_users(block: pa.Table) -> int:
    return len(block)


def _num_interactions(block: pa.Table) -> int:
    return len(Lists.of(block["item_indices"]).values)


def _items(block: pa.Table) -> NDArray[np.int32]:
    return np.unique(Lists.of(block["item_indices"]).values)


def _head(block: pa.Table, users: int) -> pa.Table:
    return block.slice(0, users)


def _span(block: pa.Table) -> tuple[int, int, int]:
    """Return the number of targets, and their first and last times."""
    times = target_times(Lists.of(block["timestamps"]))
    return (len(times), int(times.min()), int(times.max())) if len(times) else (0, 0, 0)


def _histogram(block: pa.Table, low: int, width: int) -> NDArray[np.int64]:
    return histogram(target_times(Lists.of(block["timestamps"])), low, width)


def _num_at(block: pa.Table, moment: int) -> int:
    return int(np.count_nonzero(target_times(Lists.of(block["timestamps"])) == moment))


def _write(
    block: pa.Table, numbered: tuple[int, list[Cut] | None], workspace: str, new_index: NDArray[np.int32]
) -> tuple[Part, int]:
    number, cuts = numbered
    items, times = Lists.of(block["item_indices"]), Lists.of(block["timestamps"])
    if "splits" in block.column_names:
        splits = block["splits"]
    else:
        splits = as_lists(times.offsets, leave_one_out(times) if cuts is None else by_time(times, cuts), pa.int8())
    histories = pa.table(
        [
            block["user_id"],
            block["user_hash"],
            as_lists(items.offsets, new_index[items.values], pa.int32()),
            block["timestamps"],
            splits,
        ],
        schema=HISTORIES,
    )
    return write_part(Workspace.open(workspace), number, histories)
