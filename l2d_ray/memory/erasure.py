"""Erasure of rows from units: new deletion vectors, and no change of a file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.memory.deletions import LiveUnit, Places, write_deletions
from l2d_ray.workspace import Workspace

_COLUMNS = ["sample_id", "user_hash", "item_index", "timestamp"]


@dataclass(frozen=True)
class RowErasure:
    """The rows to erase: those to which any of these applies."""

    user_hashes: IntArray
    """Hashes of users."""
    items: NDArray[np.int32]
    """Indices of the items that came next."""
    before: int | None
    """Time, in the unit of the memory, before which the next item came."""
    sample_ids: IntArray

    def applies(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Return [N] whether a row is to be erased."""
        applies = np.isin(rows["user_hash"].to_numpy(), self.user_hashes)
        applies |= np.isin(rows["item_index"].to_numpy(), self.items)
        applies |= np.isin(rows["sample_id"].to_numpy(), self.sample_ids)
        return applies if self.before is None else applies | (rows["timestamp"].to_numpy() < self.before)


def erase_rows(uri: str, units: Sequence[LiveUnit], erasure: RowErasure) -> list[LiveUnit]:
    """Return units without the rows to erase, and without such samples of the quarantine.

    A unit that has none of them is returned as it is.
    """
    workspace = Workspace.open(uri)
    return [_erase(workspace, unit, erasure) for unit in units]


def read_sample_ids(workspace: Workspace, units: Sequence[LiveUnit]) -> IntArray:
    """Return the ids of all samples in the files of units, erased and quarantined ones too, each once, ascending."""
    files = [workspace.path(file.path) for unit in units for file in unit.record.files]
    tables = [pq.read_table(file, columns=["sample_id"], filesystem=workspace.filesystem) for file in files]
    return np.unique(np.concatenate([np.empty(0, np.int64), *(table["sample_id"].to_numpy() for table in tables)]))


def _erase(workspace: Workspace, unit: LiveUnit, erasure: RowErasure) -> LiveUnit:
    erased, places = unit.erased(workspace), dict[int | None, IntArray]()
    for file in unit.record.files:
        rows = pq.read_table(workspace.path(file.path), columns=_COLUMNS, filesystem=workspace.filesystem)
        found = np.union1d(np.flatnonzero(erasure.applies(rows)), erased.get(file.shard, np.empty(0, np.int64)))
        if found.size:
            places[file.shard] = found
    if _count(places) == _count(erased):
        return unit
    return LiveUnit(unit.record, write_deletions(workspace, unit.record.unit, places))


def _count(places: Places) -> int:
    return sum(map(len, places.values()))
