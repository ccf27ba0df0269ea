"""Records of an index: its files, the memory and settings it was made from, and its measured quality."""

from pathlib import PurePosixPath
from typing import Literal

from l2d_ray.core.posterior import Parameters
from l2d_ray.core.space import SpaceKind
from l2d_ray.records import MemoryIdentity, Record

FORMAT_VERSION: Literal[3] = 3
"""Version 3: the rows of a shard are in segments."""
FOLDER = "index"


class IndexFile(Record):
    """One file; its path is relative to the workspace."""

    path: str
    bytes: int
    sha256: str


class Fitted(Record):
    """The map and the segments that all shards of an index share. Written once, because different maps do not fit."""

    map: IndexFile
    means: IndexFile
    """The estimate of items from their means."""
    trained: IndexFile
    """An empty index, trained if it needs training."""
    moments: IndexFile
    """The moments that the map was fitted to, to measure how far the memory moved since."""
    segments: list[list[str]]
    """Units of each segment, the base first (`IndexPlan.units`)."""
    kept: int = 0
    """Number of segments, from the first, that are those of an older index."""
    older: str | None = None
    """Path of the manifest of that index, which has the same map; None if the map was fitted for this one."""


class SegmentRecord(Record):
    """The rows of one shard from the units of one segment."""

    rows: int
    files: dict[str, IndexFile]
    """Files by name: rows, row_items, sample_ids, faiss."""
    faiss_version: str
    """Version of the engine that wrote the file `faiss`."""


class ShardRecord(Record):
    """A complete shard. The record is written after its files."""

    shard: int
    rows: int
    items: int
    files: dict[str, IndexFile]
    """Files by name: items, counts, centroids."""
    segments: list[SegmentRecord]
    """The rows: the base, then what came later. Indexes of several snapshots may share a segment."""
    seconds: float
    """Seconds to build the shard."""

    def all_files(self) -> list[IndexFile]:
        """Return the files of the shard and of its segments."""
        files = [*self.files.values()]
        for segment in self.segments:
            files += segment.files.values()
        return files


class IndexQuality(Record):
    """Recall of the index against a scan of all rows. Queries are rows of the memory, each left out of its result."""

    queries: int
    """Number of queries; 0 if the index is exhaustive, which finds every row by construction."""
    top_m: int
    """The M at which `recall_top_k` is lowest, of those measured (index/tuning.py)."""
    recall_top_m: float
    """Share of the exact top M rows that are found."""
    k: int
    recall_top_k: float
    """Share of the exact L2D-L top K that is recommended."""


class IndexManifest(Record):
    """A complete index."""

    format_version: Literal[3] = FORMAT_VERSION
    snapshot: int
    snapshot_digest: str
    """Digest of the snapshot's record."""
    dataset: str
    """Digest of the dataset from which the memory was built."""
    identity: MemoryIdentity
    """Identity of the memory; queries must be encoded in the same way."""
    sample_fraction: float
    space: SpaceKind
    shrinkage: float
    factory: str
    search: str
    """Search setting (`nprobe=16,k_factor=8`) that reached `target_recall`, or the best; "" if nothing can be set."""
    target_recall: float
    fitted: Fitted
    rows: int
    items: int
    """Items with at least one row."""
    bytes_per_row: float
    """Bytes of all files of the shards, divided by `rows`."""
    quality: IndexQuality
    shards: list[ShardRecord]
    seconds: float
    """Seconds of the run that completed the index."""

    def all_files(self) -> list[IndexFile]:
        """Return every file of the index."""
        shared = self.fitted
        parts = [file for shard in self.shards for file in shard.all_files()]
        return [shared.map, shared.means, shared.trained, shared.moments, *parts]


class TransitionsRecord(Record):
    """The transitions to the items of one shard, which the indexes of a snapshot share."""

    shard: int
    pairs: int
    """Pairs of an item and a target that occurred."""
    file: IndexFile
    seconds: float


class PosteriorRecord(Record):
    """The aggregation `posterior` of an index: the parameters of p(v | history), and the files that it needs."""

    parameters: Parameters
    samples: int
    """Validation samples that the parameters were fitted on; 0 if they are the defaults."""
    nats: float | None
    """Mean of -log p(target | history) over these samples; None without samples."""
    items: int
    """Items of the catalogue."""
    transitions: list[TransitionsRecord]
    """One for each shard."""
    means: list[IndexFile]
    """Item means of each shard, around the prior mean that the title predicts."""
    seconds: float
    """Seconds of the fit."""


def posterior_path(manifest: str) -> str:
    """Return the path of the `PosteriorRecord` of an index, given that of its manifest."""
    return str(PurePosixPath(manifest).with_name("posterior.json"))


def snapshot_folder(number: int, digest: str) -> str:
    """Return the folder name of all indexes of a snapshot.

    The digest tells two memories apart that were built under the same number.
    """
    return f"{number}-{digest[:8]}"


def label(
    space: SpaceKind, shrinkage: float, factory: str, sample_fraction: float, half_life_days: float | None = None
) -> str:
    """Return the folder name of an index among those of its snapshot."""
    parts = [space, *([f"{shrinkage!r}"] if space.startswith("whiten") else []), factory]
    if sample_fraction < 1:
        parts.append(f"{sample_fraction!r}")
    if half_life_days:
        parts.append(f"half-life-{half_life_days!r}")
    return "-".join(parts).replace(",", "_").replace("(", "_").replace(")", "")
