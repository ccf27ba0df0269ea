"""Raw interactions to a dataset, with Ray: read, filter by k-core, split and write.

`histories` says how blocks of users pass through these steps. Their results do not depend on the division into blocks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.exceptions import RayError

from l2d_ray.config import Config
from l2d_ray.data.catalogue import read_catalogue
from l2d_ray.data.dataset import write_manifest
from l2d_ray.data.generations import Part
from l2d_ray.data.histories import Lists, num_interactions
from l2d_ray.data.sources import PublishedSource, check_source, source_of
from l2d_ray.data.splits import SHARES, Cut, find_cut, histogram, share_ties, target_times
from l2d_ray.distributed.append import AppendResult, append
from l2d_ray.distributed.blocks import Blocks
from l2d_ray.distributed.histories import (
    num_users,
    read_histories,
    select_core,
    surviving_items,
    without_empty,
    write_parts,
)
from l2d_ray.distributed.job import root_error
from l2d_ray.distributed.screen import say
from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace


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
    items_left_out: int
    """Items of the item table without an interaction that was kept; jobs/add_items.py adds such items."""
    seconds: float
    dataset: str
    """Location of the dataset."""


def prepare_or_append(config: Config) -> PrepareResult | AppendResult:
    """Run jobs/prepare_data.py: `append` with data.append=true, else `prepare`."""
    return append(config) if config.data.append else prepare(config)


def prepare(config: Config) -> PrepareResult:
    """Read, filter, split and write the dataset of `config.data` into `config.workspace`.

    Raises InputError for input that is missing or malformed, and when the filters leave nothing.
    """
    started = time.monotonic()
    check_source(config)
    workspace, published = Workspace.open(config.workspace), isinstance(source_of(config), PublishedSource)
    try:
        catalogue = read_catalogue(config)
        blocks, dropped = read_histories(config, catalogue)
        if not published:
            blocks, dropped["k_core"] = select_core(blocks, len(catalogue), config.data.min_interactions)
        if config.data.max_users is not None:
            blocks, dropped["max_users"] = _first_users(blocks, config.data.max_users)
        dropped = {reason: count for reason, count in dropped.items() if count}
        blocks = without_empty(blocks)
        if not blocks.refs:
            raise InputError(_nothing_left(config, dropped))
        items, new_index = surviving_items(blocks, catalogue)
        cuts = _cuts(blocks) if config.data.split == "time" and not published else None
        parts = write_parts(blocks, workspace, new_index, config.data.split, cuts)
    except RayError as error:
        raise root_error(error) from None
    about = {"data": config.data.model_dump(mode="json"), **_counts(items, parts), "dropped": dropped}
    manifest = write_manifest(workspace, items, parts, about)
    _warn_if_few_are_kept(manifest["interactions"], dropped)
    seconds = round(time.monotonic() - started, 3)
    return PrepareResult(
        **_counts(items, parts),
        dropped=dropped,
        items_left_out=len(catalogue) - items.num_rows,
        seconds=seconds,
        dataset=workspace.path("dataset"),
    )


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


def _first_users(blocks: Blocks, max_users: int) -> tuple[Blocks, int]:
    """Return the first `max_users` users, and the number of interactions of the others."""
    users = np.array(blocks.ask("count users", num_users))
    quotas = np.clip(max_users - (np.cumsum(users) - users), 0, users).tolist()
    before = sum(blocks.ask("count interactions", num_interactions))
    first = blocks.map(_head, each=quotas)
    return first, before - sum(first.ask("count interactions", num_interactions))


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
