"""Units as a snapshot sees them: without the rows that were erased.

The files of a unit never change. A snapshot names a deletion vector for each unit that lost rows: a Parquet file
(`schema.DELETIONS`) with the places of these rows, as in Delta Lake and Iceberg. A place says nothing about a user.
"""

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from l2d_ray.core.arrays import IntArray
from l2d_ray.errors import InputError
from l2d_ray.memory.manifest import DataFile, DeletionVector, UnitRecord, live_name
from l2d_ray.schema import DELETIONS, memory_schema
from l2d_ray.workspace import Workspace

DELETIONS_FOLDER = "memory/deletions"
Places = Mapping[int | None, IntArray]
"""Row numbers in the files of a unit, ascending, by the shard of the file; None for the quarantine."""


@dataclass(frozen=True)
class LiveUnit:
    """A unit of a snapshot, with what was erased from it."""

    record: UnitRecord
    deletions: DeletionVector | None = None

    @property
    def name(self) -> str:
        """Name of the rows that are left: units of the same name have the same rows."""
        return live_name(self.record.unit, self.deletions)

    @property
    def rows(self) -> int:
        """Number of rows that are left."""
        return self.record.rows - (self.deletions.rows if self.deletions else 0)

    @property
    def quarantined(self) -> int:
        """Number of quarantined samples that are left."""
        return self.record.quarantined - (self.deletions.quarantined if self.deletions else 0)

    def data_files(self, shard: int | None = None) -> list[DataFile]:
        """Return the files with the rows of the unit, or of one shard of it."""
        return [file for file in self.record.files if file.shard is not None and shard in (None, file.shard)]

    def erased(self, workspace: Workspace) -> Places:
        """Read the places of the erased rows. Raises InputError if the file is missing or damaged."""
        return read_deletions(workspace, self.deletions) if self.deletions else {}

    def read(
        self, workspace: Workspace, shard: int | None = None, columns: list[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Read the rows that are left, or those of one shard, batch by batch."""
        erased = self.erased(workspace)
        for file in self.data_files(shard):
            yield from read_file(workspace, file, erased, columns)


def read_file(
    workspace: Workspace, file: DataFile, erased: Places, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Read the rows of one file of a unit that are not erased, batch by batch."""
    places, first = erased.get(file.shard, np.empty(0, np.int64)), 0
    with pq.ParquetFile(workspace.path(file.path), filesystem=workspace.filesystem) as parquet:
        for batch in parquet.iter_batches(columns=columns):
            start, stop = np.searchsorted(places, [first, first + batch.num_rows])
            is_left = np.ones(batch.num_rows, np.bool_)
            is_left[places[start:stop] - first] = False
            first += batch.num_rows
            if start < stop:
                batch = batch.filter(pa.array(is_left))
            if batch.num_rows:
                yield batch


def write_deletions(workspace: Workspace, unit: str, places: Places) -> DeletionVector:
    """Write the places of the erased rows of a unit, and return the record. The same places have the same checksum."""
    shards = sorted(places, key=lambda shard: -1 if shard is None else shard)
    table = pa.table([shards, [places[shard] for shard in shards]], schema=DELETIONS)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"{DELETIONS_FOLDER}/{unit}/{uuid.uuid4().hex[:12]}.parquet"
    with workspace.create(path) as stream:
        stream.write(content)
    quarantined = len(places.get(None, ()))
    rows = sum(map(len, places.values())) - quarantined
    return DeletionVector(path=path, sha256=sha256, rows=rows, quarantined=quarantined)


def read_deletions(workspace: Workspace, vector: DeletionVector) -> Places:
    """Read the places of erased rows. Raises InputError if the file is missing or damaged."""
    path = workspace.path(vector.path)
    try:
        content = workspace.storage.read(path)
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != vector.sha256:
        raise InputError(
            f"{path}: missing or damaged; delete the record of the snapshot that names it in memory/snapshots, and run"
            " jobs/erase.py again"
        )
    table = pq.read_table(pa.BufferReader(content))
    shards, rows = table["shard"].to_pylist(), table["rows"]
    return {shard: of_shard.values.to_numpy() for shard, of_shard in zip(shards, rows, strict=True)}


def open_rows(workspace: Workspace, units: Sequence[LiveUnit]) -> ds.Dataset:
    """Return the rows that are left in units as a pyarrow dataset, read as they are used.

    If rows were erased, it has the column `unit`, because pyarrow filters rows by their values alone. A sample that was
    erased from one unit may have a row in a later one.
    """
    files = [(unit, file) for unit in units for file in unit.data_files()]
    paths = [workspace.path(file.path) for _, file in files]
    schema = memory_schema(units[0].record.identity.dimension) if units and not paths else None
    rows = ds.dataset(paths, filesystem=workspace.filesystem, schema=schema)
    incomplete = [unit for unit in units if unit.deletions and unit.deletions.rows]
    if not incomplete:
        return rows
    unit_of = {unit.record.unit: ds.field("unit") == unit.record.unit for unit in units}
    rows = ds.FileSystemDataset.from_paths(
        paths,
        rows.schema.append(pa.field("unit", pa.string())),
        rows.format,
        workspace.filesystem,
        [unit_of[unit.record.unit] for unit, _ in files],
    )
    erased = ((unit_of[unit.record.unit], _erased_ids(workspace, unit)) for unit in incomplete)
    return rows.filter(reduce(and_, (~(is_unit & ds.field("sample_id").isin(ids)) for is_unit, ids in erased)))


def _erased_ids(workspace: Workspace, unit: LiveUnit) -> pa.Array:
    """Return the ids of the samples whose rows were erased from a unit."""
    places, ids = unit.erased(workspace), []
    for file in unit.data_files():
        if file.shard in places:
            path = workspace.path(file.path)
            column = pq.read_table(path, columns=["sample_id"], filesystem=workspace.filesystem)["sample_id"]
            ids.append(column.take(pa.array(places[file.shard])).combine_chunks())
    return pa.concat_arrays(ids)
