"""The check of a memory against its records: every file, checksum, count, shard and sample id."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.core.samples import item_shards
from l2d_ray.errors import InputError
from l2d_ray.memory.deletions import LiveUnit, Places
from l2d_ray.memory.manifest import DataFile, Snapshot, UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import hidden_states
from l2d_ray.workspace import Workspace

REMEDY = "; delete the unit's record in memory/units/ and run jobs/build_memory.py again"


@dataclass(frozen=True)
class VerifyResult:
    """Counts of everything that was checked, and the problems found."""

    snapshots: int
    units: int
    files: int
    rows: int
    bytes: int
    """Size of the files."""
    seconds: float
    problems: list[str] = field(default_factory=list)
    """One line for each difference from the records; empty for an intact memory."""


def verify(workspace: Workspace) -> VerifyResult:
    """Read the whole memory and check it. Raises InputError if there is no snapshot or a record is damaged."""
    started = time.monotonic()
    store = MemoryStore(workspace)
    store.snapshot()
    units, snapshots = store.units(), store.snapshots()
    files = [(record, file) for record in units.values() for file in record.files]
    problems = [problem for record in units.values() for problem in _check_counts(record)]
    problems += [f"{problem}{REMEDY}" for record, file in files for problem in _check_file(workspace, record, file)]
    if not problems:
        problems = [problem for snapshot in snapshots for problem in _check_snapshot(store, snapshot, units)]
    return VerifyResult(
        snapshots=len(snapshots),
        units=len(units),
        files=len(files),
        rows=sum(record.rows for record in units.values()),
        bytes=sum(file.bytes for _, file in files),
        seconds=round(time.monotonic() - started, 3),
        problems=problems,
    )


def _check_counts(record: UnitRecord) -> Iterator[str]:
    rows = sum(file.rows for file in record.files if file.shard is not None)
    quarantined = sum(file.rows for file in record.files if file.shard is None)
    if (rows, quarantined) != (record.rows, record.quarantined):
        yield (
            f"unit {record.unit}: its files hold {rows} rows and {quarantined} quarantined, but its record says"
            f" {record.rows} and {record.quarantined}{REMEDY}"
        )


def _check_file(workspace: Workspace, record: UnitRecord, file: DataFile) -> Iterator[str]:
    path = workspace.path(file.path)
    if not workspace.exists(file.path):
        yield f"{path}: missing, but unit {record.unit} lists it"
        return
    with workspace.filesystem.open_input_stream(path) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 24):
            digest.update(block)
    if digest.hexdigest() != file.sha256:
        yield f"{path}: its checksum differs from the recorded one"
        return
    with pq.ParquetFile(path, filesystem=workspace.filesystem) as parquet:
        if parquet.metadata.num_rows != file.rows:
            yield f"{path}: {parquet.metadata.num_rows} rows, but {file.rows} are recorded"
        if file.shard is not None:
            yield from (
                f"{path}: {problem}" for batch in parquet.iter_batches() for problem in _check_rows(record, file, batch)
            )


def _check_rows(record: UnitRecord, file: DataFile, rows: pa.RecordBatch) -> Iterator[str]:
    shards = item_shards(rows.column("item_index").to_numpy(), record.identity.num_shards)
    if (shards != file.shard).any():
        yield "holds items of another shard"
    if not np.isfinite(hidden_states(rows)).all():
        yield "holds a hidden state that is not finite"


def _check_snapshot(store: MemoryStore, snapshot: Snapshot, units: dict[str, UnitRecord]) -> Iterator[str]:
    name = f"snapshot {snapshot.number}"
    missing = [unit for unit in snapshot.units if unit not in units]
    if missing:
        yield f"{name}: its units {', '.join(missing)} are not committed; run jobs/build_memory.py again"
        return
    try:
        store.items(snapshot.dataset)
    except InputError as error:
        yield f"{name}: {error}"
    live = store.live_units(snapshot)
    try:
        erased = [unit.erased(store.workspace) for unit in live]
    except InputError as error:
        yield f"{name}: {error}"
        return
    for unit, places in zip(live, erased, strict=True):
        yield from (f"{name}: {problem}" for problem in _check_deletions(unit, places))
    rows, quarantined = sum(unit.rows for unit in live), sum(unit.quarantined for unit in live)
    if (rows, quarantined) != (snapshot.rows, snapshot.quarantined):
        yield (
            f"{name}: its units hold {rows} rows and {quarantined} quarantined, but its record says {snapshot.rows} and"
            f" {snapshot.quarantined}"
        )
    for unit in live:
        for difference in snapshot.identity.differences(unit.record.identity):
            yield f"{name}: unit {unit.record.unit} has another {difference}"
    for shard in range(snapshot.identity.num_shards):
        # All rows of an item are in one shard, so both copies of a repeated sample are in the same one.
        ids = [rows["sample_id"].to_numpy() for rows in store.read(snapshot, shard, ["sample_id"])]
        repeated = sum(map(len, ids)) - np.unique(np.concatenate([np.empty(0, np.int64), *ids])).size
        if repeated:
            yield f"{name}: {repeated} samples are repeated in shard {shard}"


def _check_deletions(unit: LiveUnit, erased: Places) -> Iterator[str]:
    rows_in = {file.shard: file.rows for file in unit.record.files}
    for shard, places in erased.items():
        if len(places) and not 0 <= places[0] <= places[-1] < rows_in.get(shard, 0):
            yield f"unit {unit.record.unit}: erased rows of shard {shard} are outside its file"
    quarantined = len(erased.get(None, ()))
    counts = sum(map(len, erased.values())) - quarantined, quarantined
    if unit.deletions and counts != (unit.deletions.rows, unit.deletions.quarantined):
        yield f"unit {unit.record.unit}: {counts[0]} rows and {counts[1]} quarantined are erased, not as recorded"
