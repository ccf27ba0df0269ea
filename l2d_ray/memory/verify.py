"""Checking a memory against its own records: every file, checksum, count, shard and sample id."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.core.samples import item_shards
from l2d_ray.errors import InputError
from l2d_ray.memory.manifest import DataFile, Snapshot, UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import hidden_states
from l2d_ray.workspace import Workspace

REMEDY = "; delete its unit's record in memory/units/ and run jobs/build_memory.py again"


@dataclass(frozen=True)
class VerifyResult:
    """What was checked, and one line for everything that is not as recorded."""

    snapshots: int
    units: int
    files: int
    rows: int
    bytes: int
    seconds: float
    problems: list[str] = field(default_factory=list)


def verify(workspace: Workspace) -> VerifyResult:
    """Read the whole memory once. Raises InputError if there is no snapshot or a record cannot be read."""
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
        yield f"unit {record.unit}: its files hold {rows} rows and {quarantined} quarantined, its counts are others"


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
        yield f"{path}: its checksum is not the recorded one"
        return
    with pq.ParquetFile(path, filesystem=workspace.filesystem) as parquet:
        if parquet.metadata.num_rows != file.rows:
            yield f"{path}: {parquet.metadata.num_rows} rows, recorded were {file.rows}"
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
        yield f"{name}: not committed: {', '.join(missing)}"
        return
    try:
        store.items(snapshot.dataset)
    except InputError as error:
        yield f"{name}: {error}"
    parts = [units[unit] for unit in snapshot.units]
    counts = sum(part.rows for part in parts), sum(part.quarantined for part in parts)
    if counts != (snapshot.rows, snapshot.quarantined):
        yield f"{name}: {snapshot.rows} rows and {snapshot.quarantined} quarantined recorded, its units hold others"
    for part in parts:
        for difference in snapshot.identity.differences(part.identity):
            yield f"{name}: unit {part.unit} has another {difference}"
    for shard in range(snapshot.identity.num_shards):
        # All rows of a sample's item are in one shard, so that a sample that came twice did so here.
        ids = [rows["sample_id"].to_numpy() for rows in store.read(snapshot, shard, ["sample_id"])]
        repeated = sum(map(len, ids)) - np.unique(np.concatenate([np.empty(0, np.int64), *ids])).size
        if repeated:
            yield f"{name}: {repeated} samples are there more than once in shard {shard}"
