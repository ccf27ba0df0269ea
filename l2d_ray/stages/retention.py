"""The removal of what no kept snapshot and no kept version of the dataset names.

Kept are the newest `compact.keep_snapshots` snapshots, those that were replaced less than `compact.keep_days` ago, and
those whose index was built last or is served. Of the dataset, the newest version is kept, those of kept snapshots, and
those that were replaced less than `compact.keep_days` ago. Indexes of other snapshots go, but for files that a kept
index names.

A record goes before the files that it names. Before both, a list of them is written, so that the next run ends what a
killed one began. A file that no record names may be one that a job is about to name: it stays `compact.grace_hours`.
"""

import math
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from l2d_ray.config import CompactConfig
from l2d_ray.data.dataset import HISTORIES_FOLDER, read_versions
from l2d_ray.data.dataset import ITEMS_FOLDER as DATASET_ITEMS
from l2d_ray.data.versions import VERSIONS_FOLDER, Version, version_path
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import FOLDER as INDEX_FOLDER
from l2d_ray.index.manifest import snapshot_folder
from l2d_ray.memory.deletions import DELETIONS_FOLDER
from l2d_ray.memory.manifest import Snapshot, UnitRecord
from l2d_ray.memory.store import (
    DATA_FOLDER,
    ITEMS_FOLDER,
    QUARANTINE_FOLDER,
    SNAPSHOTS_FOLDER,
    UNITS_FOLDER,
    MemoryStore,
    items_path,
    snapshot_path,
    unit_path,
)
from l2d_ray.stages.settings import INDEX, IndexSettings
from l2d_ray.workspace import Workspace

RELEASES_FOLDER, REMOVALS_FOLDER = "serving", "memory/removals"
DAY, HOUR = 86_400, 3_600


@dataclass(frozen=True)
class Removal:
    """Counts of a removal."""

    snapshots: int
    versions: int
    files: int
    """Files of all kinds, records included."""
    pinned: list[int]
    """Numbers of snapshots that are kept only for their index, which was built last or is served."""
    holding_erased: int
    """Snapshots and versions that are kept, and whose files hold what was erased later."""


def expire(workspace: Workspace, config: CompactConfig) -> Removal:
    """Remove what is not kept."""
    now, memory, versions = time.time(), MemoryStore(workspace), list(read_versions(workspace)[1])
    snapshots, units = memory.snapshots(), memory.units()
    kept_snapshots, pinned = _kept_snapshots(workspace, snapshots, config, now)
    kept_versions = _kept_versions(workspace, versions, kept_snapshots, config, now)
    listed = {unit for snapshot in snapshots for unit in snapshot.units if unit in units}
    kept_units = {unit for snapshot in kept_snapshots for unit in snapshot.units if unit in units}

    written = workspace.times("dataset") | workspace.times("memory") | workspace.times(INDEX_FOLDER)
    is_old = {path for path, at in written.items() if at <= now - config.grace_hours * HOUR}
    lists = workspace.files(REMOVALS_FOLDER, ".json")
    abandoned = {path for one in lists for path in _abandoned(workspace, one, written)}
    unlisted = {unit for unit in units.keys() - listed if unit_path(unit) not in abandoned}
    if all(unit_path(unit) in is_old for unit in unlisted):  # else a build is under way, which may take longer
        unlisted = set()

    named = _named(kept_versions, kept_snapshots, [units[unit] for unit in kept_units | unlisted])
    expired = _named(versions, snapshots, [units[unit] for unit in listed])
    expired |= _indexes(workspace, snapshots, kept_snapshots)
    strays = {path for path in is_old if path.startswith(NAMED_FOLDERS) or path.endswith(".tmp")}
    gone = sorted(((expired | abandoned | strays) - named) & written.keys())
    _remove(workspace, gone, lists)
    return Removal(
        snapshots=sum(path.startswith(SNAPSHOTS_FOLDER) for path in gone),
        versions=sum(path.startswith(VERSIONS_FOLDER) for path in gone),
        files=len(gone),
        pinned=pinned,
        holding_erased=_holding_erased(kept_versions, kept_snapshots),
    )


def _holding_erased(versions: list[Version], snapshots: list[Snapshot]) -> int:
    """Return the number of versions, the newest first, and snapshots whose files hold what was erased."""
    newest, erasures = versions[0], set(versions[0].erasures)
    return sum(bool(erasures - set(version.lineage)) for version in versions) + sum(
        bool(snapshot.deletions or erasures & set(newest.since(snapshot.dataset))) for snapshot in snapshots
    )


def _abandoned(workspace: Workspace, removals: str, written: Mapping[str, float]) -> set[str]:
    """Return the files of the list of a killed run; not those that a build has written again since.

    None if another compaction has just ended what that run began.
    """
    try:
        paths = workspace.read_json(removals)["paths"]
    except InputError:
        return set()
    return {path for path in paths if written.get(path, math.inf) <= written.get(removals, 0.0)}


def _named(versions: Iterable[Version], snapshots: Iterable[Snapshot], units: Iterable[UnitRecord]) -> set[str]:
    """Return the paths of records, and of the files that they name."""
    named: set[str] = set()
    for version in versions:
        parts = (part.path for generation in version.generations for part in generation.files)
        named |= {version_path(version.number), *version.item_files, *parts}
    for snapshot in snapshots:
        vectors = (vector.path for vector in snapshot.deletions.values())
        named |= {snapshot_path(snapshot.number), items_path(snapshot.dataset), *vectors}
    for unit in units:
        named |= {unit_path(unit.unit), *(file.path for file in unit.files)}
    return named


NAMED_FOLDERS = (
    SNAPSHOTS_FOLDER,
    UNITS_FOLDER,
    DATA_FOLDER,
    QUARANTINE_FOLDER,
    DELETIONS_FOLDER,
    ITEMS_FOLDER,
    VERSIONS_FOLDER,
    HISTORIES_FOLDER,
    DATASET_ITEMS,
)
"""Folders whose files a record names."""


def _remove(workspace: Workspace, paths: list[str], lists: Iterable[str]) -> None:
    """Remove files, records first, and these lists of killed runs."""
    if paths:
        started = f"{REMOVALS_FOLDER}/{uuid.uuid4().hex[:12]}.json"
        workspace.write_json(started, {"paths": paths})
        lists = [*lists, started]
    for is_record in (True, False):
        workspace.remove(path for path in paths if path.endswith(".json") == is_record)
    workspace.remove(lists)


def _kept_snapshots(
    workspace: Workspace, snapshots: list[Snapshot], config: CompactConfig, now: float
) -> tuple[list[Snapshot], list[int]]:
    """Return the snapshots to keep, and the numbers of those that are kept for their index alone."""
    written = workspace.times(SNAPSHOTS_FOLDER)
    kept = snapshots[-config.keep_snapshots :]
    for snapshot, successor in pairwise(snapshots):
        is_recent = written.get(snapshot_path(successor.number), now) > now - config.keep_days * DAY
        if is_recent and snapshot not in kept:
            kept.append(snapshot)
    last = IndexSettings.read(workspace, INDEX).index.snapshot if workspace.exists(INDEX) else None
    releases = " ".join(_text(workspace, path) for path in workspace.files(RELEASES_FOLDER))
    served = set(re.findall(rf'"{INDEX_FOLDER}/([^/"]+)/', releases))
    pinned = [
        snapshot
        for snapshot in snapshots
        if snapshot not in kept and (snapshot.number == last or _index_folder(snapshot) in served)
    ]
    return kept + pinned, [snapshot.number for snapshot in pinned]


def _kept_versions(
    workspace: Workspace, versions: list[Version], snapshots: list[Snapshot], config: CompactConfig, now: float
) -> list[Version]:
    """Return the versions of the dataset to keep, of `versions` from the newest to the oldest."""
    written, needed, kept = workspace.times(VERSIONS_FOLDER), {snapshot.dataset for snapshot in snapshots}, versions[:1]
    for successor, version in pairwise(versions):
        is_recent = written.get(version_path(successor.number), now) > now - config.keep_days * DAY
        is_needed = version.lineage[-1] in needed - {newer.lineage[-1] for newer in kept}
        if is_recent or is_needed:
            kept.append(version)
    return kept


def _indexes(workspace: Workspace, snapshots: list[Snapshot], kept: list[Snapshot]) -> set[str]:
    """Return the files of indexes of snapshots that are not kept, but for those that a kept index names.

    A snapshot newer than the newest of `snapshots` was taken meanwhile.
    """
    newest = max((snapshot.number for snapshot in snapshots), default=0)
    folders = set(map(_index_folder, kept))
    found, named = set(), set()
    for path in workspace.files(INDEX_FOLDER):
        folder = path.split("/")[1]
        if folder in folders and path.endswith(".json"):
            named |= {*re.findall(rf'"({INDEX_FOLDER}/[^"]+)"', _text(workspace, path))}
        elif folder not in folders and re.match(r"\d+-", folder) and int(folder.partition("-")[0]) <= newest:
            found.add(path)
    return found - named


def _index_folder(snapshot: Snapshot) -> str:
    return snapshot_folder(snapshot.number, snapshot.digest())


def _text(workspace: Workspace, path: str) -> str:
    return workspace.storage.read(workspace.path(path)).decode()
