"""The records of a memory: what a unit holds and what a snapshot lists."""

from l2d_ray.records import MemoryIdentity, Record


class DataFile(Record):
    """One Parquet file, relative to the workspace."""

    path: str
    rows: int
    bytes: int
    sha256: str
    shard: int | None = None
    """Which shard's rows; None for a quarantine file."""


class UnitRecord(Record):
    """A committed unit. Its files are in place before this record is."""

    unit: str
    identity: MemoryIdentity
    files: list[DataFile]
    rows: int
    quarantined: int
    tokens: int
    """Tokens that went through the model."""
    tokens_one_by_one: int
    """Tokens of all its prompts."""
    seconds: float


class Snapshot(Record):
    """An immutable list of units: the memory at one moment."""

    number: int
    identity: MemoryIdentity
    dataset: str
    """Digest of the dataset whose samples these are."""
    sample_fraction: float
    units: list[str]
    rows: int
    quarantined: int
