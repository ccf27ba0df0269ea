"""Records of a memory: its units and its snapshots."""

from pydantic import Field

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


class DeletionVector(Record):
    """The record of the file that has the places of a unit's erased rows (`deletions`)."""

    path: str
    """Path relative to the workspace."""
    sha256: str
    rows: int
    """Number of erased rows."""
    quarantined: int
    """Number of erased samples of the quarantine."""


def live_name(unit: str, deletions: DeletionVector | None) -> str:
    """Return the name of the rows that are left in a unit. Rows of the same name are the same in every snapshot."""
    return f"{unit}-{deletions.sha256[:16]}" if deletions else unit


class Snapshot(Record):
    """An immutable list of units: the memory at one point in time."""

    number: int
    identity: MemoryIdentity
    dataset: str
    """Digest of the version of the dataset that the samples come from."""
    sample_fraction: float
    """Share of the dataset's samples, from 0 to 1."""
    units: list[str]
    deletions: dict[str, DeletionVector] = Field({}, exclude_if=lambda deletions: not deletions)
    """Erased rows of units, by unit. The field is left out of a record without any."""
    rows: int
    """Number of rows, without the erased ones."""
    quarantined: int
