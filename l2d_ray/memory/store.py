"""The memory store: units, committed whole or not at all, and snapshots of them."""

import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.errors import InputError, one_line
from l2d_ray.memory.deletions import LiveUnit
from l2d_ray.memory.manifest import Snapshot, UnitRecord
from l2d_ray.memory.writer import UnitWriter
from l2d_ray.records import MemoryIdentity, add_record, record_numbers
from l2d_ray.workspace import Workspace

DATA_FOLDER, QUARANTINE_FOLDER = "memory/data", "memory/quarantine"
UNITS_FOLDER, SNAPSHOTS_FOLDER, ITEMS_FOLDER = "memory/units", "memory/snapshots", "memory/items"
HELD_OUT = "held-out"
"""Folder of the workspace with the rows of validation and test samples, apart from the memory (`stages.extraction`)."""
FEW_UNITS = 50
"""Units up to which their folders are listed one by one. One request lists a thousand files of all units."""


class MemoryStore:
    """The memory of one workspace."""

    def __init__(self, workspace: Workspace) -> None:
        """Read and create nothing yet."""
        self.workspace = workspace

    def units(self) -> dict[str, UnitRecord]:
        """Read every committed unit. Raises InputError if a record is damaged."""
        paths = self.workspace.files(UNITS_FOLDER, ".json")
        with ThreadPoolExecutor(32) as pool:  # reads from an object store mostly wait
            records = pool.map(lambda path: UnitRecord.read(self.workspace, path), paths)
            return {record.unit: record for record in records}

    def committed(self, unit: str) -> UnitRecord | None:
        """Read the record of a unit. Returns None if the unit is not committed."""
        path = unit_path(unit)
        return UnitRecord.read(self.workspace, path) if self.workspace.exists(path) else None

    def accept(self, identity: MemoryIdentity) -> dict[str, UnitRecord]:
        """Read every committed unit. Raises InputError, naming the differences, if one has another identity."""
        units = self.units()
        for record in units.values():
            self.accept_unit(record, identity)
        return units

    def accept_unit(self, record: UnitRecord, identity: MemoryIdentity) -> None:
        """Raise InputError, naming the differences, if a unit has another identity."""
        differences = identity.differences(record.identity)
        if differences:
            raise InputError(
                f"{self.workspace.path('memory')}: was made with another {', '.join(differences)}; use another"
                " workspace, or delete this folder"
            )

    @contextmanager
    def write_unit(self, unit: str, identity: MemoryIdentity) -> Iterator[UnitWriter]:
        """Open a writer for one attempt at a unit. Commits the unit at the end of the block, unless the block raises.

        Attempts share no file, so two attempts at the same time do no harm: the first to commit wins, and the other's
        files are removed. This happens when a worker that is believed dead is still running.
        """
        started = time.monotonic()
        writer = UnitWriter(self.workspace, unit, attempt=uuid.uuid4().hex[:12], identity=identity)
        with writer:
            yield writer
        try:
            writer.record(time.monotonic() - started).write(self.workspace, unit_path(unit))
        except FileExistsError:
            for file in writer.files:
                self.workspace.delete(file.path)

    def remove_strays(self, units: Iterable[str]) -> None:
        """Remove files of these units that killed attempts left behind. No attempt may be running."""
        cleaned, folders = set(units), [DATA_FOLDER, QUARANTINE_FOLDER]
        if len(cleaned) <= FEW_UNITS:
            folders = [f"{folder}/{unit}" for folder in folders for unit in sorted(cleaned)]
        with ThreadPoolExecutor(32) as pool:
            records = filter(None, pool.map(self.committed, cleaned))
            keep = {file.path for record in records for file in record.files}
        for path in (path for folder in folders for path in self.workspace.files(folder)):
            if path not in keep and path.split("/")[2] in cleaned:
                self.workspace.delete(path)

    def snapshot_numbers(self) -> list[int]:
        """Return the numbers of all snapshots, ascending."""
        return record_numbers(self.workspace, SNAPSHOTS_FOLDER)

    def snapshots(self) -> list[Snapshot]:
        """Read all snapshots, the oldest first."""
        return [self.snapshot(number) for number in self.snapshot_numbers()]

    def newest(self) -> Snapshot | None:
        """Read the newest snapshot. Returns None if there is none."""
        numbers = self.snapshot_numbers()
        return self.snapshot(numbers[-1]) if numbers else None

    def snapshot(self, number: int | None = None) -> Snapshot:
        """Read snapshot `number`, or the newest. Raises InputError if there is none."""
        if number is not None:
            return Snapshot.read(self.workspace, snapshot_path(number))
        newest = self.newest()
        if newest is None:
            raise InputError(f"{self.workspace.path(SNAPSHOTS_FOLDER)}: no snapshot; run jobs/build_memory.py first")
        return newest

    def take_snapshot(
        self, units: Iterable[str], dataset: str, sample_fraction: float, kept: Collection[str] = ()
    ) -> Snapshot:
        """Record these committed units as the newest snapshot. Does nothing if the newest lists them already.

        What was erased from a unit stays erased. `kept` are the units that are listed because the newest snapshot had
        them. Raises InputError, by name, if a unit is not committed, if two units have different identities, or if
        another job replaced a unit of `kept` meanwhile.
        """
        names = sorted(units)
        records = self._committed_alike(names)
        while True:
            newest = self.newest()
            if replaced := set(kept) - set(newest.units if newest else kept):
                raise InputError(
                    f"{self.workspace.path(SNAPSHOTS_FOLDER)}: another job replaced units meanwhile"
                    f" ({', '.join(sorted(replaced))}); run the same command again"
                )
            deletions = {name: newest.deletions[name] for name in names if name in newest.deletions} if newest else {}
            live = [LiveUnit(record, deletions.get(record.unit)) for record in records]
            snapshot = Snapshot(
                number=newest.number + 1 if newest else 1,
                identity=records[0].identity,
                dataset=dataset,
                sample_fraction=sample_fraction,
                units=names,
                deletions=deletions,
                rows=sum(unit.rows for unit in live),
                quarantined=sum(unit.quarantined for unit in live),
            )
            if newest and (newest.units, newest.identity, newest.dataset) == (names, snapshot.identity, dataset):
                return newest
            with suppress(FileExistsError):  # another job took this number at the same moment
                return self.add_snapshot(snapshot)

    def add_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Write the record of the next snapshot. Raises FileExistsError if it is not the newest one then."""
        add_record(self.workspace, SNAPSHOTS_FOLDER, snapshot.number, snapshot)
        return snapshot

    def _committed_alike(self, names: list[str]) -> list[UnitRecord]:
        """Read the records of these units. Raises InputError unless all are committed and have one identity."""
        known = self.units()
        missing = [name for name in names if name not in known]
        where = self.workspace.path(UNITS_FOLDER)
        if missing or not names:
            raise InputError(
                f"{where}: a snapshot needs committed units; not committed: {', '.join(missing) or 'any'}; run"
                " jobs/build_memory.py again"
            )
        records = [known[name] for name in names]
        for record in records:
            differences = records[0].identity.differences(record.identity)
            if differences:
                raise InputError(
                    f"{where}: units {record.unit} and {records[0].unit} differ in {', '.join(differences)}; use"
                    " another workspace"
                )
        return records

    def keep_items(self, dataset: str, items: pa.Table) -> None:
        """Save the items (`schema.ITEMS`) of the dataset with this digest, before a snapshot of it is taken.

        The workspace may get a newer dataset later.
        """
        with self.workspace.create(items_path(dataset)) as stream:
            pq.write_table(items, stream, compression="zstd")

    def items(self, dataset: str) -> pa.Table:
        """Read the items that `keep_items` saved. Raises InputError if they are missing or damaged."""
        path = self.workspace.path(items_path(dataset))
        try:
            return pq.read_table(path, filesystem=self.workspace.filesystem)
        except (OSError, pa.ArrowInvalid) as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({one_line(error)})"
            raise InputError(
                f"{path}: {reason}; run jobs/build_memory.py again with the dataset that the memory was made from"
            ) from None

    def live_units(self, snapshot: Snapshot) -> list[LiveUnit]:
        """Return the units of a snapshot, each with what was erased from it."""
        with ThreadPoolExecutor(32) as pool:  # reads from an object store mostly wait
            paths = [unit_path(unit) for unit in snapshot.units]
            records = pool.map(lambda path: UnitRecord.read(self.workspace, path), paths)
            return [LiveUnit(record, snapshot.deletions.get(record.unit)) for record in records]

    def read(
        self, snapshot: Snapshot, shard: int | None = None, columns: list[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Read the rows of a snapshot, or of one of its shards, batch by batch. Erased rows are left out."""
        for unit in self.live_units(snapshot):
            yield from unit.read(self.workspace, shard, columns)


def unit_path(unit: str) -> str:
    """Return the path of the record of a unit."""
    return f"{UNITS_FOLDER}/{unit}.json"


def snapshot_path(number: int) -> str:
    """Return the path of the record of a snapshot."""
    return f"{SNAPSHOTS_FOLDER}/{number}.json"


def items_path(dataset: str) -> str:
    """Return the path of the items of the dataset with this digest."""
    return f"{ITEMS_FOLDER}/{dataset[:16]}.parquet"
