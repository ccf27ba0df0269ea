"""Compaction of a memory: units without what was erased from them, and large units in place of small ones."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from l2d_ray.memory.deletions import LiveUnit, read_file
from l2d_ray.memory.manifest import Snapshot, UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import SAMPLES, hidden_states
from l2d_ray.workspace import Workspace

GROUP_ROWS = 8192
"""Rows of a row group, at least, while there are more."""


def plan_merges(units: Sequence[LiveUnit], unit_samples: int) -> list[list[LiveUnit]]:
    """Return groups of units to write again, each as one unit.

    These are the units with erased rows, and those of fewer than half of `unit_samples` samples. A group has at most
    `unit_samples`, unless a unit alone has more.
    """
    groups: list[list[LiveUnit]] = []
    size = 0
    for unit in units:
        samples = unit.rows + unit.quarantined
        if unit.deletions or samples < unit_samples / 2:
            if not groups or size + samples > unit_samples:
                groups.append([])
                size = 0
            groups[-1].append(unit)
            size += samples
    return [group for group in groups if len(group) > 1 or group[0].deletions]


def merge_units(uri: str, units: Sequence[LiveUnit]) -> UnitRecord:
    """Write what is left of units as one unit, and return its record; skip one that is committed."""
    workspace = Workspace.open(uri)
    store, identity = MemoryStore(workspace), units[0].record.identity
    digest = hashlib.sha256(" ".join(unit.name for unit in units).encode()).hexdigest()
    name = f"merged-{digest[:16]}"
    if committed := store.committed(name):
        return committed
    with store.write_unit(name, identity) as writer:
        for shard in range(identity.num_shards):
            for rows in _in_groups(batch for unit in units for batch in unit.read(workspace, shard)):
                writer.write(rows.select(SAMPLES.names), hidden_states(rows))
        for unit in units:
            for rows in _quarantined(workspace, unit):
                for reason in pc.unique(rows["reason"]).to_pylist():
                    writer.quarantine(rows.filter(pc.equal(rows["reason"], reason)).select(SAMPLES.names), reason)
            writer.count_tokens(unit.record.tokens, unit.record.tokens_one_by_one)
            writer.earlier_seconds += unit.record.seconds
    record = store.committed(name)
    assert record, "committed above"
    return record


def with_merged(snapshot: Snapshot, groups: Sequence[Sequence[LiveUnit]], merged: Sequence[str]) -> Snapshot | None:
    """Return the snapshot after this one, with merged units in place of the groups that they were made of.

    None if the snapshot does not have these units, or not with the same rows.
    """
    replaced = {unit.record.unit: unit.deletions for group in groups for unit in group}
    if any(name not in snapshot.units or snapshot.deletions.get(name) != replaced[name] for name in replaced):
        return None
    return snapshot.model_copy(
        update={
            "number": snapshot.number + 1,
            "units": sorted({*snapshot.units, *merged} - replaced.keys()),
            "deletions": {name: vector for name, vector in snapshot.deletions.items() if name not in replaced},
        }
    )


def _in_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        if sum(one.num_rows for one in pending) >= GROUP_ROWS:
            yield pa.Table.from_batches(pending)
            pending = []
    if pending:
        yield pa.Table.from_batches(pending)


def _quarantined(workspace: Workspace, unit: LiveUnit) -> Iterator[pa.Table]:
    erased = unit.erased(workspace)
    for file in unit.record.files:
        if file.shard is None:
            yield from (pa.Table.from_batches([batch]) for batch in read_file(workspace, file, erased))
