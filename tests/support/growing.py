"""A dataset that grows, and its memory, by the steps of the jobs but without Ray."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config, DataConfig, MemoryConfig
from l2d_ray.data.catalogue import Catalogue
from l2d_ray.data.dataset import Dataset, write_manifest, write_part, write_version
from l2d_ray.data.generations import Part
from l2d_ray.data.growth import grow_catalogue, select_new
from l2d_ray.data.histories import Lists, as_lists, group, held_lengths, item_counts, occurring_items, renumber, select
from l2d_ray.data.interactions import READ, user_hashes
from l2d_ray.data.samples import iter_samples
from l2d_ray.data.splits import everything
from l2d_ray.encoding import identify_memory
from l2d_ray.memory.manifest import Snapshot
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import ERASED_ITEM, HISTORIES, ITEMS, SAMPLES, Split
from l2d_ray.stages.extraction import UnitExtractor, plan_growth
from l2d_ray.workspace import Workspace
from support.small_memory import DIMENSION, identity

Log = list[tuple[str, str, int]]
"""Interactions: user, item and time."""


def random_log(count: int, users: int, items: int, seed: int = 0, first: int = 0) -> Log:
    """Return interactions in time order; one in three has the time of the one before."""
    random = np.random.default_rng(seed)
    times = first + np.cumsum(random.integers(0, 3, count) > 0)
    pairs = zip(random.integers(0, users, count), random.integers(0, items, count), strict=True)
    return [(f"u{user}", f"i{item}", int(time)) for (user, item), time in zip(pairs, times, strict=True)]


def titles_of(log: Log) -> dict[str, str]:
    """Return a title for each item, by its id."""
    return {item: f"Title {item[1:]} of the year" for item in sorted({item for _, item, _ in log})}


def prepare(folder: Path | str, log: Log, titles: dict[str, str], k: int = 1) -> Dataset:
    """Write a first version with data.split=none."""
    workspace, catalogue = Workspace.open(str(folder)), _catalogue(titles)
    block = _core(group(_interactions(log, catalogue)), len(catalogue), 0, k)
    items, new_index = _items(block, catalogue, 0)
    data = DataConfig(split="none", min_interactions=k).model_dump(mode="json")
    write_manifest(workspace, items, [_write(workspace, block, new_index, 1)], {"data": data})
    return Dataset.open(workspace)


def append(dataset: Dataset, log: Log, titles: dict[str, str], k: int = 1) -> tuple[Dataset, dict[str, int]]:
    """Return the dataset with these interactions, and the numbers of refused ones by reason."""
    catalogue, changed_titles = grow_catalogue(dataset.items(), _catalogue(titles))
    known, given = len(dataset.items()), group(_interactions(log, catalogue))
    held = dataset.find_users(given["user_id"].combine_chunks(), given["user_hash"].to_numpy())
    new, refused = select_new(given, held)
    block = _core(new, len(catalogue), known, k)
    refused["k_core"] = _count_new(new) - _count_new(block)
    if len(block) == 0:
        return dataset, refused
    items, new_index = _items(block, catalogue, known)
    new_users = int(np.count_nonzero(held_lengths(block) == 0))
    parts = [_write(dataset.workspace, block, new_index, dataset.version.number + 1)]
    return write_version(dataset, items.slice(known), new_users, parts, refused, changed_titles), refused


def histories_of(dataset: Dataset) -> dict[str, list[tuple[str, int]]]:
    """Return the items and times of each user, in the order of the dataset, without what was erased."""
    ids = dataset.items()["item_id"].to_pylist()
    return {
        user["user_id"]: [
            (ids[item], time)
            for item, time in zip(user["item_indices"], user["timestamps"], strict=True)
            if item != ERASED_ITEM
        ]
        for users in dataset.iter_users()
        for user in users.to_pylist()
    }


def build_memory(config: Config) -> Snapshot:
    """Build what the memory lacks of the newest version, and take a snapshot."""
    workspace = Workspace.open(config.workspace)
    store, dataset = MemoryStore(workspace), Dataset.open(workspace)
    kept, units = plan_growth(config, dataset, next(reversed(store.snapshots()), None), store.units())
    extractor = UnitExtractor(config, identify_memory(config))
    names = [*kept, *(extractor.build(unit).unit for unit in units)]
    store.keep_items(dataset.digest, dataset.items())
    return store.take_snapshot(names, dataset.digest, config.memory.sample_fraction, kept)


def _catalogue(titles: dict[str, str]) -> Catalogue:
    return Catalogue(pa.array(list(titles)), pa.array(list(titles.values())), np.zeros(len(titles), np.uint8))


def _interactions(log: Log, catalogue: Catalogue) -> pa.Table:
    users, items, times = (pa.array(column) for column in zip(*log, strict=True))
    found = catalogue.find(items)
    assert (found >= 0).all()
    rows = np.arange(len(log))
    return pa.table([users, user_hashes(users), found, times, np.zeros(len(log), np.int32), rows], schema=READ)


def _core(block: pa.Table, candidates: int, known: int, k: int) -> pa.Table:
    stays = np.ones(candidates, np.bool_)
    while True:
        items, found = item_counts(block, stays, k)
        counts = np.zeros(candidates, np.int64)
        counts[items] = found
        passes = (counts >= k) | (np.arange(candidates) < known)
        if np.array_equal(passes, stays):
            return select(block, stays, k)
        stays = passes


def _items(block: pa.Table, catalogue: Catalogue, known: int) -> tuple[pa.Table, NDArray[np.int32]]:
    occurs = np.arange(len(catalogue)) < known
    occurs[occurring_items(block)] = True
    new_index, rows = np.cumsum(occurs) - 1, pa.array(np.flatnonzero(occurs))
    columns = [pa.array(range(len(rows)), pa.int32()), catalogue.item_ids.take(rows), catalogue.titles.take(rows)]
    return pa.table(columns, schema=ITEMS), new_index


def _write(workspace: Workspace, block: pa.Table, new_index: NDArray[np.int32], version: int) -> tuple[Part, int]:
    items, times = Lists.of(block["item_indices"]), Lists.of(block["timestamps"])
    splits = as_lists(times.offsets, everything(times, held_lengths(block)), pa.int8())
    lists = as_lists(items.offsets, renumber(items.values, new_index.astype(np.int32)), pa.int32())
    columns = [block["user_id"], block["user_hash"], lists, block["timestamps"], splits]
    return write_part(workspace, 0, pa.table(columns, schema=HISTORIES), version)


def _count_new(block: pa.Table) -> int:
    return int((Lists.of(block["item_indices"]).lengths - held_lengths(block)).sum())


def build_without_model(folder: Path | str, units: int = 3, fraction: float = 1.0, refuse: int = 0) -> Snapshot:
    """Do the same with `fake_states`, and with one of `refuse` samples in the quarantine."""
    config = Config(workspace=str(folder), memory=MemoryConfig(units=units, sample_fraction=fraction))
    workspace = Workspace.open(config.workspace)
    store, dataset = MemoryStore(workspace), Dataset.open(workspace)
    kept, planned = plan_growth(config, dataset, store.newest(), store.units())
    for unit in planned:
        if store.committed(unit.name):
            continue
        with store.write_unit(unit.name, identity(num_shards=2)) as writer:
            for batch in iter_samples(dataset.generations[unit.generation], Split.TRAIN, unit.start, unit.stop):
                samples = batch.in_fraction(config.history, fraction)
                columns = [samples.sample_ids, samples.user_hashes, samples.targets, samples.target_timestamps]
                rows, refused = pa.table(columns, schema=SAMPLES), np.zeros(len(samples), np.bool_)
                refused |= bool(refuse) & (samples.sample_ids % max(refuse, 1) == 0)
                writer.quarantine(rows.filter(pa.array(refused)), "refused")
                writer.write(rows.filter(pa.array(~refused)), fake_states(samples.sample_ids[~refused]))
    store.keep_items(dataset.digest, dataset.items())
    return store.take_snapshot([*kept, *(unit.name for unit in planned)], dataset.digest, fraction, kept)


def fake_states(sample_ids: NDArray[np.int64]) -> NDArray[np.float16]:
    """Return a state for each sample that no other sample has."""
    return np.ascontiguousarray(sample_ids).view(np.uint8).reshape(-1, DIMENSION).astype(np.float16)
