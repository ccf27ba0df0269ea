"""The records of an index: what a shard holds, what the index was made from, and how good it measured itself to be."""

from typing import Literal

from l2d_ray.core.space import SpaceKind
from l2d_ray.records import MemoryIdentity, Record

FORMAT_VERSION: Literal[2] = 2
"""2: the item means of whiten-within are posterior means."""
FOLDER = "index"


class IndexFile(Record):
    """One file, relative to the workspace."""

    path: str
    bytes: int
    sha256: str


class ShardRecord(Record):
    """A complete shard. Its files are in place before this record is."""

    shard: int
    rows: int
    items: int
    files: dict[str, IndexFile]
    """By name: rows, row_items, sample_ids, faiss, items, counts, centroids."""
    faiss_version: str
    seconds: float


class IndexQuality(Record):
    """What the index loses against looking at every row, on rows of the memory as queries, themselves left out."""

    queries: int
    top_m: int
    """Of the M that were looked at (index/tuning.py) the one at which it recommends least of the exact top K."""
    recall_top_m: float
    """Share of the exact top M rows that it finds."""
    k: int
    recall_top_k: float
    """Share of the exact L2D-L top K that it recommends."""


class IndexManifest(Record):
    """A complete index."""

    format_version: Literal[2] = FORMAT_VERSION
    snapshot: int
    snapshot_digest: str
    """Of the snapshot's record: which memory this is of."""
    dataset: str
    """Digest of the dataset whose samples the rows are."""
    identity: MemoryIdentity
    """Of the memory; queries must be encoded in the same way."""
    sample_fraction: float
    space: SpaceKind
    shrinkage: float
    factory: str
    search: str
    """Search setting (`nprobe=16,k_factor=8`) that reached `target_recall`, or the best; "" if there is none."""
    target_recall: float
    map: IndexFile
    rows: int
    items: int
    """Items with at least one row."""
    bytes_per_row: float
    """All files of the shards."""
    quality: IndexQuality
    shards: list[ShardRecord]
    seconds: float
    """Of the run that completed it."""


def snapshot_folder(number: int, digest: str) -> str:
    """The folder name of all indexes of a snapshot: which memory it is, not only its number."""
    return f"{number}-{digest[:8]}"


def label(space: SpaceKind, shrinkage: float, factory: str, sample_fraction: float) -> str:
    """The folder name of an index among those of its snapshot."""
    parts = [space, *([f"{shrinkage!r}"] if space.startswith("whiten") else []), factory]
    if sample_fraction < 1:
        parts.append(f"{sample_fraction!r}")
    return "-".join(parts).replace(",", "_").replace("(", "_").replace(")", "")
