"""Reading and writing a memory: units that appear whole or not at all, and snapshots of them."""

import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.errors import InputError, one_line
from l2d_ray.memory.manifest import Snapshot, UnitRecord
from l2d_ray.memory.writer import UnitWriter
from l2d_ray.records import MemoryIdentity
from l2d_ray.workspace import Workspace

UNITS, SNAPSHOTS, ITEMS = "memory/units", "memory/snapshots", "memory/items"


class MemoryStore:
    """The memory of one workspace."""

    def __init__(self, workspace: Workspace) -> None:
        """Nothing is read or created yet."""
        self.workspace = workspace

    def units(self) -> dict[str, UnitRecord]:
        """Every committed unit. Raises InputError if a record is damaged."""
        paths = self.workspace.files(UNITS, ".json")
        with ThreadPoolExecutor(32) as pool:  # on an object store a read is mostly waiting
            records = pool.map(lambda path: UnitRecord.read(self.workspace, path), paths)
            return {record.unit: record for record in records}

    def committed(self, unit: str) -> UnitRecord | None:
        """The record of a unit, or None if it was never committed."""
        path = f"{UNITS}/{unit}.json"
        return UnitRecord.read(self.workspace, path) if self.workspace.exists(path) else None

    def accept(self, identity: MemoryIdentity) -> dict[str, UnitRecord]:
        """Every committed unit. Raises InputError, by naming what differs, if one was made in another way."""
        units = self.units()
        for record in units.values():
            self.accept_unit(record, identity)
        return units

    def accept_unit(self, record: UnitRecord, identity: MemoryIdentity) -> None:
        """Raise InputError, by naming what differs, if a unit was made in another way."""
        differences = identity.differences(record.identity)
        if differences:
            raise InputError(
                f"{self.workspace.path('memory')}: was made with another {', '.join(differences)}; use another"
                " workspace, or delete this folder"
            )

    @contextmanager
    def write_unit(self, unit: str, identity: MemoryIdentity) -> Iterator[UnitWriter]:
        """A writer for one attempt at a unit. When the block ends the unit is committed; when it raises, nothing is.

        An attempt writes files of its own, so that two attempts at once (a worker believed dead, say) do no harm: the
        first to commit wins, the other's files are removed. (An object store decides that less strictly than a disk:
        two commits within the same moment can both pass.)
        """
        started = time.monotonic()
        writer = UnitWriter(self.workspace, unit, attempt=uuid.uuid4().hex[:12], identity=identity)
        with writer:
            yield writer
        try:
            writer.record(time.monotonic() - started).write(self.workspace, f"{UNITS}/{unit}.json")
        except FileExistsError:
            for file in writer.files:
                self.workspace.delete(file.path)

    def remove_strays(self, units: Iterable[str]) -> None:
        """Remove the files of these units that killed attempts left behind. No attempt may be running."""
        mine = set(units)
        keep = {file.path for record in self.units().values() for file in record.files}
        for folder in ("memory/data", "memory/quarantine"):
            for path in self.workspace.files(folder):
                if path not in keep and path.split("/")[2] in mine:
                    self.workspace.delete(path)

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, the oldest first."""
        found = [Snapshot.read(self.workspace, path) for path in self.workspace.files(SNAPSHOTS, ".json")]
        return sorted(found, key=lambda snapshot: snapshot.number)

    def snapshot(self, number: int | None = None) -> Snapshot:
        """Snapshot `number`, or the newest. Raises InputError if there is none."""
        if number is not None:
            return Snapshot.read(self.workspace, f"{SNAPSHOTS}/{number}.json")
        snapshots = self.snapshots()
        if not snapshots:
            raise InputError(f"{self.workspace.path(SNAPSHOTS)}: no snapshot; run jobs/build_memory.py first")
        return snapshots[-1]

    def take_snapshot(self, units: Iterable[str], dataset: str, sample_fraction: float) -> Snapshot:
        """Record that these committed units make one memory: the newest. If it is that already, nothing changes.

        Raises InputError, by name, if the units disagree in what they must share or one is not committed.
        """
        names = sorted(units)
        known = self.units()
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise InputError(f"a snapshot needs committed units; not committed: {', '.join(missing) or 'any'}")
        first = known[names[0]]
        for name in names:
            differences = first.identity.differences(known[name].identity)
            if differences:
                raise InputError(f"units {name} and {first.unit} differ in {', '.join(differences)}")
        earlier = self.snapshots()
        for newest in earlier[-1:]:
            if (newest.units, newest.identity, newest.dataset) == (names, first.identity, dataset):
                return newest
        snapshot = Snapshot(
            number=earlier[-1].number + 1 if earlier else 1,
            identity=first.identity,
            dataset=dataset,
            sample_fraction=sample_fraction,
            units=names,
            rows=sum(known[name].rows for name in names),
            quarantined=sum(known[name].quarantined for name in names),
        )
        snapshot.write(self.workspace, f"{SNAPSHOTS}/{snapshot.number}.json")
        return snapshot

    def keep_items(self, dataset: str, items: pa.Table) -> None:
        """Keep the items (`schema.ITEMS`) of the dataset with this digest: the workspace may have a newer one some day.

        To be called before a snapshot of it is taken.
        """
        with self.workspace.create(_items_path(dataset)) as stream:
            pq.write_table(items, stream, compression="zstd")

    def items(self, dataset: str) -> pa.Table:
        """What `keep_items` kept. Raises InputError if it is missing or damaged."""
        path = self.workspace.path(_items_path(dataset))
        try:
            return pq.read_table(path, filesystem=self.workspace.filesystem)
        except (OSError, pa.ArrowInvalid) as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({one_line(error)})"
            raise InputError(
                f"{path}: {reason}; run jobs/build_memory.py again, with the dataset that the memory was made of"
            ) from None

    def read(
        self, snapshot: Snapshot, shard: int | None = None, columns: list[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a snapshot, or of one of its shards, batch by batch."""
        for path in self.data_files(snapshot, shard):
            with pq.ParquetFile(self.workspace.path(path), filesystem=self.workspace.filesystem) as parquet:
                yield from parquet.iter_batches(columns=columns)

    def data_files(self, snapshot: Snapshot, shard: int | None = None) -> Iterator[str]:
        """Yield the paths, in the workspace, of the files with the rows of a snapshot or of one of its shards."""
        for unit in snapshot.units:
            for file in UnitRecord.read(self.workspace, f"{UNITS}/{unit}.json").files:
                if file.shard is not None and shard in (None, file.shard):
                    yield file.path


def _items_path(dataset: str) -> str:
    return f"{ITEMS}/{dataset[:16]}.parquet"
