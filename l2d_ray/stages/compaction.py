"""The compaction of a workspace, without Ray: fewer and larger files, and none of what is not kept.

1. Merge generations of the dataset (`data.compaction`): a version with the same content.
2. Merge small units of the memory, and write units again that lost rows (`memory.compaction`): a snapshot with the same
   rows.
3. Remove what is not kept (`retention`).

Readers of older versions and snapshots are not disturbed until these are removed. Each step appears at once, and the
same command continues a run that was killed. If another job changes the dataset or the memory meanwhile, the step is
put on top of that change, or starts again.
"""

import time
from dataclasses import dataclass

from l2d_ray.config import Config
from l2d_ray.data.compaction import ITEM_FILES, merge_generations, merged_version, plan_merge
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.versions import commit_version
from l2d_ray.memory.compaction import merge_units, plan_merges, with_merged
from l2d_ray.memory.deletions import LiveUnit
from l2d_ray.memory.manifest import Snapshot, UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.stages.extraction import SAMPLES_PER_UNIT
from l2d_ray.stages.retention import expire
from l2d_ray.stages.steps import Run, on_newest
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class CompactResult:
    """Counts of the workspace after a compaction, and of what this run removed."""

    version: int
    """Number of the dataset's newest version."""
    generations: int
    """Generations of histories that it has."""
    snapshot: int | None
    """Number of the memory's newest snapshot; None without a memory."""
    units: int
    """Units that it has."""
    rows: int
    removed_snapshots: int
    removed_versions: int
    removed_files: int
    """Files of all kinds, records included."""
    pinned: list[int]
    """Numbers of older snapshots that are kept only for their index, which was built last or is served."""
    holding_erased: int
    """Older snapshots of the memory and versions of the dataset that are kept and hold what was erased later."""
    seconds: float


def compact(config: Config, run: Run) -> CompactResult:
    """Compact the dataset and the memory of `config.workspace`. Raises InputError if there is no dataset."""
    started, workspace = time.monotonic(), Workspace.open(config.workspace)
    dataset = _compact_dataset(workspace, run)
    snapshot = _compact_memory(workspace, run)
    removed = expire(workspace, config.compact)
    return CompactResult(
        version=dataset.version.number,
        generations=len(dataset.generations),
        snapshot=snapshot.number if snapshot else None,
        units=len(snapshot.units) if snapshot else 0,
        rows=snapshot.rows if snapshot else 0,
        removed_snapshots=removed.snapshots,
        removed_versions=removed.versions,
        removed_files=removed.files,
        pinned=removed.pinned,
        holding_erased=removed.holding_erased,
        seconds=round(time.monotonic() - started, 3),
    )


def _compact_dataset(workspace: Workspace, run: Run) -> Dataset:
    """Return the newest version of the dataset, after a merge of its generations if there is something to merge."""
    store = MemoryStore(workspace)

    def work(old: Dataset) -> Dataset:
        snapshots = store.snapshots()
        pending: list[str] = []
        if snapshots and snapshots[-1].dataset in old.version.lineage:
            pending = old.version.since(snapshots[-1].dataset)
        elif store.units():  # a build is under way, whose units are parts of these generations
            pending = [generation.version for generation in old.version.generations]
        places = plan_merge(old.version, pending)
        if not places and len(old.version.item_files) <= ITEM_FILES:
            return old
        number = old.version.number + 1
        (parts,) = run("merge histories", merge_generations, [(old, places, number)]) if places else [[]]
        version = merged_version(old, places, parts, {snapshot.dataset for snapshot in snapshots})
        commit_version(workspace, version)
        return Dataset(workspace, old.manifest, version)

    return on_newest(lambda: Dataset.open(workspace), work, key=lambda dataset: dataset.version)


def _compact_memory(workspace: Workspace, run: Run) -> Snapshot | None:
    """Return the newest snapshot, after a merge of its units if there is something to merge; None without a memory."""
    store = MemoryStore(workspace)

    def work(newest: Snapshot | None) -> Snapshot | None:
        groups = plan_merges(store.live_units(newest), SAMPLES_PER_UNIT) if newest else []
        if not groups:
            return newest
        merged = run("merge units", merge_units, [(workspace.uri, group) for group in groups])
        return on_newest(store.newest, lambda base: _replace(store, base, groups, merged))

    return on_newest(store.newest, work)


def _replace(
    store: MemoryStore, newest: Snapshot | None, groups: list[list[LiveUnit]], merged: list[UnitRecord]
) -> Snapshot:
    """Take the snapshot with merged units. Raises FileExistsError if the newest one is without the units before."""
    after = with_merged(newest, groups, [unit.unit for unit in merged]) if newest else None
    if after is None:
        raise FileExistsError(f"{store.workspace.path('memory')}: another job replaced units that were merged")
    return store.add_snapshot(after)
