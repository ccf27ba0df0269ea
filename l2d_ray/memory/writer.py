"""The writer of one unit: rows go to their items' shards, refused samples to the quarantine, all with checksums."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l2d_ray.core.samples import item_shards
from l2d_ray.memory.manifest import DataFile, UnitRecord
from l2d_ray.records import MemoryIdentity
from l2d_ray.schema import QUARANTINE, memory_schema
from l2d_ray.workspace import DigestingSink, Workspace


class UnitWriter:
    """One attempt at one unit, as a context manager. Its files appear when the block ends without an error."""

    def __init__(self, workspace: Workspace, unit: str, attempt: str, identity: MemoryIdentity) -> None:
        """Create nothing before the first row."""
        self.files: list[DataFile] = []
        """The unit's files, after the block has ended."""
        self.earlier_seconds = 0.0
        """Seconds that the rows took before this attempt."""
        self._workspace, self._unit, self._attempt, self._identity = workspace, unit, attempt, identity
        self._schema = memory_schema(identity.dimension)
        self._tables: dict[int | None, _ParquetFile] = {}
        self._stack = ExitStack()
        self._tokens = self._tokens_one_by_one = 0

    def write(self, samples: pa.Table, states: NDArray[np.float16]) -> None:
        """Append samples (schema.SAMPLES) and their states [N, D]. Quarantines samples with a non-finite state."""
        finite = np.isfinite(states).all(axis=1)
        self.quarantine(samples.filter(pa.array(~finite)), "non-finite hidden state")
        samples, states = samples.filter(pa.array(finite)), states[finite]
        rows = samples.append_column(self._schema.field("hidden_state"), _binary(states))
        shards = item_shards(samples["item_index"].to_numpy(), self._identity.num_shards)
        for shard in np.unique(shards):
            self._append(int(shard), self._schema, rows.filter(pa.array(shards == shard)))

    def quarantine(self, samples: pa.Table, reason: str) -> None:
        """Append samples (schema.SAMPLES) to the quarantine, with the reason."""
        if samples.num_rows:
            reasons = pa.array([reason] * samples.num_rows, pa.string())
            self._append(None, QUARANTINE, samples.append_column("reason", reasons))

    def count_tokens(self, run: int, one_by_one: int) -> None:
        """Add to the unit's counts: tokens that went through the model, and tokens of all prompts."""
        self._tokens += run
        self._tokens_one_by_one += one_by_one

    def record(self, seconds: float) -> UnitRecord:
        """Return the record to commit, after the block has ended."""
        return UnitRecord(
            unit=self._unit,
            identity=self._identity,
            files=self.files,
            rows=sum(file.rows for file in self.files if file.shard is not None),
            quarantined=sum(file.rows for file in self.files if file.shard is None),
            tokens=self._tokens,
            tokens_one_by_one=self._tokens_one_by_one,
            seconds=round(self.earlier_seconds + seconds, 3),
        )

    def _append(self, shard: int | None, schema: pa.Schema, rows: pa.Table) -> None:
        if shard not in self._tables:
            folder = f"quarantine/{self._unit}" if shard is None else f"data/{self._unit}/shard={shard}"
            path = f"memory/{folder}/{self._attempt}.parquet"
            self._tables[shard] = self._stack.enter_context(_ParquetFile(self._workspace, path, schema, shard))
        self._tables[shard].append(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self.files = [table.file() for table in self._tables.values()]


class _ParquetFile:
    """A Parquet file of the workspace, while it is being written."""

    def __init__(self, workspace: Workspace, path: str, schema: pa.Schema, shard: int | None) -> None:
        self._path, self._shard, self._schema, self._rows = path, shard, schema, 0
        self._created = workspace.create(path)

    def append(self, rows: pa.Table) -> None:
        """Append one row group."""
        self._parquet.write_table(rows.cast(self._schema))
        self._rows += rows.num_rows

    def file(self) -> DataFile:
        """Return the file's entry in the unit's record."""
        sink = self._sink
        return DataFile(path=self._path, rows=self._rows, bytes=sink.count, sha256=sink.sha256, shard=self._shard)

    def __enter__(self) -> Self:
        self._sink = DigestingSink(self._created.__enter__())
        # Hidden states do not compress and never repeat; the other columns are small, and their values do repeat.
        compression = {name: "none" if name == "hidden_state" else "zstd" for name in self._schema.names}
        dictionary = [name for name in self._schema.names if name != "hidden_state"]
        self._parquet = pq.ParquetWriter(
            self._sink, self._schema, compression=compression, use_dictionary=dictionary, write_statistics=dictionary
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._parquet.close()
        except BaseException as problem:
            self._created.__exit__(type(problem), problem, problem.__traceback__)
            raise
        finally:
            self._parquet.is_open = False  # else its destructor would try to write the footer and print an error
        self._created.__exit__(kind, error, trace)


def _binary(states: NDArray[np.float16]) -> pa.Array:
    """View float16 [N, D] as N binary values of 2 D bytes each, without a copy."""
    states = np.ascontiguousarray(states)
    width = pa.binary(2 * states.shape[1])
    return pa.Array.from_buffers(width, states.shape[0], [None, pa.py_buffer(states)])
