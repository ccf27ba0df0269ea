"""Formulas of the time, bytes and requests of a memory, from its sizes and measured rates.

`jobs/bench_scale.py` measures the rates and checks the formula from 1 to 100 times the samples.
"""

from dataclasses import dataclass

COLUMN_BYTES = 28
"""Bytes of a row besides the hidden state, before compression: two 64-bit ids, an item and a time."""
FILE_BYTES = 1_500
"""Bytes of a Parquet file of one row group besides its rows: the schema and statistics."""
UPLOAD_PART = 10 * 2**20
"""Bytes of one part of a large upload. A file up to this size takes one request, a larger one two more than parts."""
WRITES_PER_UNIT, READS_PER_UNIT = 2, 9
"""Requests of a unit besides its data files: stores charge more for a write or a listing than for a read."""
LISTED_PER_REQUEST = 1_000
"""Objects that one request lists."""


@dataclass(frozen=True)
class MemorySizes:
    """The counts that decide what a memory takes."""

    samples: int
    units: int
    shards: int
    dimension: int
    """Numbers of a hidden state, which take two bytes each."""

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows, without what the files add."""
        return self.samples * (2 * self.dimension + COLUMN_BYTES)

    @property
    def files(self) -> int:
        """Data files. A unit has one for each shard."""
        return self.units * self.shards

    @property
    def bytes(self) -> int:
        """Bytes of all data files."""
        return self.rows_bytes + self.files * FILE_BYTES

    @property
    def data_requests(self) -> int:
        """Requests that upload the data files."""
        parts = -(-self.bytes // max(self.files, 1) // UPLOAD_PART)
        return self.files * (1 if parts <= 1 else parts + 2)

    @property
    def writes(self) -> int:
        """Requests that a store charges as writes: data files, records, listings."""
        return self.data_requests + self.units * WRITES_PER_UNIT + 4 * (1 + self.files // LISTED_PER_REQUEST)

    @property
    def reads(self) -> int:
        """Requests that a store charges as reads."""
        return self.units * READS_PER_UNIT


@dataclass(frozen=True)
class Rates:
    """Measured rates of workers."""

    samples_per_second: float
    """Rate of one worker that works alone."""
    start_seconds: float
    """Time between the start of the job and the first work of its workers."""
    scaling: float = 1.0
    """Rate of each of several workers, over that of one alone."""

    def seconds(self, samples: int, workers: int) -> float:
        """Return the duration of a job that builds this many samples."""
        each = self.samples_per_second * (self.scaling if workers > 1 else 1.0)
        return self.start_seconds + samples / (each * workers)
