"""The erasure of users, items or a time from the dataset and the memory of a workspace, without Ray.

First comes a version of the dataset without them, then a snapshot of the memory. Each appears at once. Files do not
change: what was erased stays readable in the versions and snapshots before, until jobs/compact.py removes these. If the
job is killed in between, any later erasure makes the snapshot, too, without all that the dataset lacks by then;
jobs/build_memory.py does nothing before.

Of two jobs that change the dataset or the memory at the same time one comes first, and the other starts again from what
it finds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2d_ray.config import Config, EraseConfig
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.times import units_per_second
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.erasure import ErasedPart, Erasure, erase_part, find_emptied, next_version
from l2d_ray.data.files import numbered_lines
from l2d_ray.data.histories import Lists
from l2d_ray.data.interactions import user_hashes
from l2d_ray.data.samples import iter_samples
from l2d_ray.data.versions import commit_version
from l2d_ray.errors import InputError
from l2d_ray.memory.deletions import LiveUnit
from l2d_ray.memory.erasure import RowErasure, erase_rows, read_sample_ids
from l2d_ray.memory.manifest import Snapshot
from l2d_ray.memory.store import HELD_OUT, MemoryStore
from l2d_ray.schema import Split
from l2d_ray.stages.steps import Run, on_newest
from l2d_ray.workspace import Workspace

UNITS_PER_TASK = 16
NO_IDS, NO_ITEMS = np.empty(0, np.int64), np.empty(0, np.int32)


@dataclass(frozen=True)
class EraseResult:
    """Counts of what was erased by this run, and where the workspace stands."""

    version: int
    """Number of the dataset's version."""
    users: int
    """Users who are gone."""
    samples: int
    """Samples of the dataset that are gone, of all splits."""
    snapshot: int | None
    """Number of the memory's newest snapshot; None without a memory."""
    rows: int
    """Rows of the memory that are gone."""
    quarantined: int
    """Samples of its quarantine that are gone."""
    unknown: int
    """Ids of users and items that were given and that the dataset does not have."""
    left: list[str]
    """Files of the workspace that hold samples of users and are not written again: reports and exports."""
    seconds: float


@dataclass(frozen=True)
class Selection:
    """Ids and a time that the settings name."""

    user_ids: pa.Array
    item_ids: pa.Array
    midnight: float | None
    """Unix time."""

    @classmethod
    def read(cls, config: EraseConfig) -> "Selection":
        """Read the files. Raises InputError if nothing is named, and for a file that is missing or empty."""
        if not (config.users or config.items or config.before):
            raise InputError("erase.users, erase.items and erase.before are missing; give at least one of them")
        day = config.before
        midnight = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() if day else None
        return cls(_ids(config.users), _ids(config.items), midnight)

    def before(self, dataset: Dataset) -> int | None:
        """Return the time before which all is erased, in the unit of a dataset."""
        if self.midnight is None:
            return None
        newest = int(Lists.of(next(dataset.iter_users())["timestamps"]).values.max())
        return int(self.midnight) * units_per_second(newest)

    def in_items(self, items: pa.Table) -> NDArray[np.int32]:
        """Return the indices of the items that are among these (`schema.ITEMS`)."""
        found = pc.index_in(self.item_ids, value_set=items["item_id"].combine_chunks())
        return np.asarray(found.drop_null(), np.int32)


def erase(config: Config, run: Run) -> EraseResult:
    """Erase what `config.erase` names from the dataset and the memory of `config.workspace`.

    Raises InputError if there is no dataset, if nothing would be left of it, or if the memory lacks samples of it.
    """
    started, workspace, selection = time.monotonic(), Workspace.open(config.workspace), Selection.read(config.erase)
    before = MemoryStore(workspace).newest()
    change = on_newest(
        lambda: Dataset.open(workspace),
        lambda dataset: _erase_dataset(dataset, selection, run),
        key=lambda dataset: dataset.version,
    )
    old, new = change.old, change.new
    after = _erase_memory(new, change.rows, run)
    workspace.delete(HELD_OUT)  # rows of validation and test samples, which an evaluation computes again
    return EraseResult(
        version=new.version.number,
        users=old.num_users - new.num_users,
        samples=_num_samples(old) - _num_samples(new),
        snapshot=after.number if after else None,
        rows=max(0, before.rows - after.rows) if before and after else 0,
        quarantined=max(0, before.quarantined - after.quarantined) if before and after else 0,
        unknown=change.unknown,
        left=[*workspace.files("reports", ".parquet"), *workspace.files("export")],
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass(frozen=True)
class _Change:
    """A dataset before and after an erasure, which are the same if nothing was erased."""

    old: Dataset
    new: Dataset
    rows: "_Rows"
    """Rows of the memory to erase with it."""
    unknown: int
    """Ids that were given and that the old dataset does not have."""


@dataclass(frozen=True)
class _Rows:
    """The rows of the memory that one erasure erases."""

    selection: Selection
    before: int | None
    """Time before which all is erased, in the unit of the dataset."""
    without_history: IntArray
    """Ids of samples that lost their whole history."""

    def of(self, store: MemoryStore, digest: str) -> RowErasure:
        """Return them for a memory of this version of the dataset."""
        selection = self.selection
        items = selection.in_items(store.items(digest)) if len(selection.item_ids) else NO_ITEMS
        return RowErasure(np.sort(user_hashes(selection.user_ids)), items, self.before, self.without_history)


def _erase_dataset(old: Dataset, selection: Selection, run: Run) -> _Change:
    """Erase from the dataset. Raises FileExistsError if another job changed it meanwhile."""
    erasure = Erasure(selection.user_ids, selection.in_items(old.items()), selection.before(old))
    _finish_erasure(old, run)
    known = len(old.find_users(erasure.user_ids, erasure.user_hashes)) + erasure.items.size
    if not erasure.of_users_alone:
        (emptied,) = run("users with nothing left", find_emptied, [(old, erasure)])
        erasure = erasure.with_users(emptied)
    parts = _erase_parts(old, erasure, run)
    lost = [part.without_history for of_generation in parts for part in of_generation]
    unknown = len(selection.user_ids) + len(selection.item_ids) - known
    rows = _Rows(selection, erasure.before, np.concatenate([NO_IDS, *lost]))
    return _Change(old, _commit(old, parts), rows, unknown)


def _finish_erasure(dataset: Dataset, run: Run) -> None:
    """Erase from the memory what a killed run has erased from the dataset, so that the memory can grow again."""
    newest = MemoryStore(dataset.workspace).newest()
    if newest and dataset.version.erased_since(newest.dataset) != newest.dataset:
        _erase_memory(dataset, None, run)


def _erase_parts(dataset: Dataset, erasure: Erasure, run: Run) -> list[list[ErasedPart]]:
    """Write the parts of the next version of a dataset, by generation."""
    version = dataset.version.number + 1
    calls = [(dataset.workspace.uri, part, erasure, version, n) for n, part in enumerate(dataset.parts)]
    parts = iter(run("erase from the dataset", erase_part, calls))
    return [[next(parts) for _ in generation.parts] for generation in dataset.generations]


def _commit(old: Dataset, parts: list[list[ErasedPart]]) -> Dataset:
    """Make these parts the next version, if anything changed. Raises FileExistsError if another job was first."""
    if not any(part.changed for of_generation in parts for part in of_generation):
        return old
    where, version = old.workspace.path("dataset"), next_version(old, parts)
    if not version.generations:
        raise InputError(f"{where}: no history would be left; delete the workspace, or erase less")
    newest = MemoryStore(old.workspace).newest()
    later = old.version.since(newest.dataset) if newest else []
    if newest and set(later) - set(old.version.erasures):
        raise InputError(
            f"{where}: snapshot {newest.number} of the memory lacks samples of version {old.version.number}; run"
            " jobs/build_memory.py first"
        )
    commit_version(old.workspace, version)
    return Dataset(old.workspace, old.manifest, version)


def _erase_memory(dataset: Dataset, rows: _Rows | None, run: Run) -> Snapshot | None:
    """Return the newest snapshot of the memory, without what is erased; None if there is no memory.

    If the dataset has other erasures that the memory lacks, or `rows` is None, every row goes whose sample the dataset
    does not have.
    """
    store = MemoryStore(dataset.workspace)

    def work(newest: Snapshot | None) -> Snapshot | None:
        if newest is None:
            return None
        digest, live = dataset.version.erased_since(newest.dataset), store.live_units(newest)
        version = _version(dataset, digest)
        chunks = [live[start : start + UNITS_PER_TASK] for start in range(0, len(live), UNITS_PER_TASK)]
        uri, own = store.workspace.uri, {newest.dataset, dataset.digest}
        if rows and digest in own and not set(dataset.version.since(newest.dataset)) - own:
            erasure = rows.of(store, newest.dataset)
            found = run("erase from the memory", erase_rows, [(uri, chunk, erasure) for chunk in chunks])
        else:
            found = run("erase from the memory", erase_absent, [(uri, chunk, version.digest) for chunk in chunks])
        after = _without(newest, [unit for chunk in found for unit in chunk], digest)
        if digest != newest.dataset:
            store.keep_items(digest, version.items())
        elif after.deletions == newest.deletions and after.units == newest.units:
            return newest
        return store.add_snapshot(after)

    return on_newest(store.newest, work)


def _version(dataset: Dataset, digest: str) -> Dataset:
    """Return this version of a dataset; if a compaction has removed it, the newest one, which has all that it had."""
    if digest == dataset.digest:
        return dataset
    try:
        return Dataset.open(dataset.workspace, digest)
    except InputError:
        return dataset


def erase_absent(uri: str, units: Sequence[LiveUnit], digest: str) -> list[LiveUnit]:
    """Return units without the rows whose samples this version of the dataset does not train on, as `erase_rows`."""
    workspace = Workspace.open(uri)
    ids = read_sample_ids(workspace, units)
    for batch in iter_samples(Dataset.open(workspace, digest), Split.TRAIN):
        ids = np.setdiff1d(ids, batch.sample_ids)
    return erase_rows(uri, units, RowErasure(NO_IDS, NO_ITEMS, None, ids))


def _without(newest: Snapshot, units: list[LiveUnit], digest: str) -> Snapshot:
    """Return the snapshot after the newest one, of these units and this version of the dataset.

    A unit that lost everything is left out.
    """
    left = [unit for unit in units if not unit.deletions or unit.rows or unit.quarantined] or units[:1]
    return newest.model_copy(
        update={
            "number": newest.number + 1,
            "dataset": digest,
            "units": [unit.record.unit for unit in left],
            "deletions": {unit.record.unit: unit.deletions for unit in left if unit.deletions},
            "rows": sum(unit.rows for unit in left),
            "quarantined": sum(unit.quarantined for unit in left),
        }
    )


def _ids(path: str | None) -> pa.Array:
    """Return the ids of a file, each once, in order."""
    lines = {line for _, line in numbered_lines(path)} if path else set()
    return pa.array(sorted(lines), pa.string())


def _num_samples(dataset: Dataset) -> int:
    return sum(sum(part.samples.values()) for part in dataset.parts)
