"""The erasure of users, items or a time from the dataset and the memory of a workspace, without Ray.

First comes a version of the dataset without them, then a snapshot of the memory. Each appears at once. Files do not
change: what was erased stays readable in the versions and snapshots before, until jobs/compact.py removes these. If the
job is killed in between, the same command makes the snapshot; jobs/build_memory.py does nothing before.

Of two jobs that change the dataset or the memory at the same time one comes first, and the other starts again from what
it finds.
"""

import time
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
from l2d_ray.data.versions import commit_version
from l2d_ray.errors import InputError
from l2d_ray.memory.deletions import LiveUnit
from l2d_ray.memory.erasure import RowErasure, erase_rows
from l2d_ray.memory.manifest import Snapshot
from l2d_ray.memory.store import HELD_OUT, MemoryStore
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
    workspace.delete(HELD_OUT)  # rows of validation and test samples, which an evaluation computes again
    change = on_newest(
        lambda: Dataset.open(workspace),
        lambda dataset: _erase_dataset(dataset, selection, run),
        key=lambda dataset: dataset.version,
    )
    old, new = change.old, change.new
    before, after = _erase_memory(new, selection, change.before, change.without_history, run) or (None, None)
    return EraseResult(
        version=new.version.number,
        users=old.num_users - new.num_users,
        samples=_num_samples(old) - _num_samples(new),
        snapshot=after.number if after else None,
        rows=before.rows - after.rows if before and after else 0,
        quarantined=before.quarantined - after.quarantined if before and after else 0,
        unknown=change.unknown,
        left=[*workspace.files("reports", ".parquet"), *workspace.files("export")],
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass(frozen=True)
class _Change:
    """A dataset before and after an erasure, which are the same if nothing was erased."""

    old: Dataset
    new: Dataset
    before: int | None
    """Time before which all was erased, in the unit of the dataset."""
    without_history: IntArray
    """Ids of samples that lost their whole history."""
    unknown: int
    """Ids that were given and that the old dataset does not have."""


def _erase_dataset(old: Dataset, selection: Selection, run: Run) -> _Change:
    """Erase from the dataset. Raises FileExistsError if another job changed it meanwhile."""
    erasure = Erasure(selection.user_ids, selection.in_items(old.items()), selection.before(old))
    _finish_erasure(old, selection, erasure.before, run)
    known = len(old.find_users(erasure.user_ids, erasure.user_hashes)) + erasure.items.size
    if not erasure.of_users_alone:
        (emptied,) = run("users with nothing left", find_emptied, [(old, erasure)])
        erasure = erasure.with_users(emptied)
    parts = _erase_parts(old, erasure, run)
    lost = [part.without_history for of_generation in parts for part in of_generation]
    unknown = len(selection.user_ids) + len(selection.item_ids) - known
    return _Change(old, _commit(old, parts), erasure.before, np.concatenate([NO_IDS, *lost]), unknown)


def _finish_erasure(dataset: Dataset, selection: Selection, before: int | None, run: Run) -> None:
    """Erase from the memory what a killed run has erased from the dataset, so that the memory can grow again."""
    newest = MemoryStore(dataset.workspace).newest()
    if newest and dataset.version.erased_since(newest.dataset) != newest.dataset:
        _erase_memory(dataset, selection, before, NO_IDS, run)


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


def _erase_memory(
    dataset: Dataset, selection: Selection, before: int | None, without_history: IntArray, run: Run
) -> tuple[Snapshot, Snapshot] | None:
    """Return the newest snapshot of the memory, and the one without what is erased; None if there is no memory.

    If nothing is to be erased, both are the same.
    """
    store = MemoryStore(dataset.workspace)

    def work(newest: Snapshot | None) -> tuple[Snapshot, Snapshot] | None:
        if newest is None:
            return None
        items = selection.in_items(store.items(newest.dataset)) if len(selection.item_ids) else NO_ITEMS
        rows = RowErasure(np.sort(user_hashes(selection.user_ids)), items, before, without_history)
        live = store.live_units(newest)
        chunks = [live[start : start + UNITS_PER_TASK] for start in range(0, len(live), UNITS_PER_TASK)]
        calls = [(store.workspace.uri, chunk, rows) for chunk in chunks]
        units = [unit for chunk in run("erase from the memory", erase_rows, calls) for unit in chunk]
        after = _without(newest, units, dataset)
        if after.dataset != newest.dataset:
            store.keep_items(after.dataset, dataset.items())
        elif after.deletions == newest.deletions and after.units == newest.units:
            return newest, newest
        return newest, store.add_snapshot(after)

    return on_newest(store.newest, work)


def _without(newest: Snapshot, units: list[LiveUnit], dataset: Dataset) -> Snapshot:
    """Return the snapshot after the newest one, of these units; a unit that lost everything is left out."""
    left = [unit for unit in units if not unit.deletions or unit.rows or unit.quarantined] or units[:1]
    return newest.model_copy(
        update={
            "number": newest.number + 1,
            "dataset": dataset.version.erased_since(newest.dataset),
            "units": [unit.record.unit for unit in left],
            "deletions": {unit.record.unit: unit.deletions for unit in left if unit.deletions},
            "rows": sum(unit.rows for unit in left),
            "quarantined": sum(unit.quarantined for unit in left),
        }
    )


def _ids(path: str | None) -> pa.Array:
    """Return the ids of a file, each once, in order."""
    lines = {line.strip() for _, line in numbered_lines(path)} if path else set()
    return pa.array(sorted(lines), pa.string())


def _num_samples(dataset: Dataset) -> int:
    return sum(sum(part.samples.values()) for part in dataset.parts)
