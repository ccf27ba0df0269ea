"""Records of a memory: its units and its snapshots."""

from l2d_ray.records import MemoryIdentity, Record


class DataFile(Record):
    """The record of one Parquet file."""

    path: str
    """Path relative to the workspace."""
    rows: int
    bytes: int
    sha256: str
    shard: int | None = None
    """Shard of the rows; None for a quarantine file."""


class UnitRecord(Record):
    """The record of a committed unit. It is written after the unit's files are complete."""

    unit: str
    identity: MemoryIdentity
    files: list[DataFile]
    rows: int
    """Number of samples with a row."""
    quarantined: int
    """Number of samples without one."""
    tokens: int
    """Tokens that went through the model."""
    tokens_one_by_one: int
    """Tokens of all prompts, which is what would run without packing."""
    seconds: float
    """Time from the start of the attempt to the commit."""


class Snapshot(Record):
    """An immutable list of units: the memory at one point in time."""

    number: int
    identity: MemoryIdentity
    dataset: str
    """Digest of the version of the dataset that the samples come from."""
    sample_fraction: float
    """Share of the dataset's samples, from 0 to 1."""
    units: list[str]
    rows: int
    quarantined: int
