"""One shard of an index: its files, and the search for the rows near a query.

The rows are in segments: those of the first build, and smaller ones of what came later. A row has a number in the
shard, with the segments one after the other.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Amounts, Float64, FloatArray, IntArray
from l2d_ray.core.decoding import Neighbours, nearest
from l2d_ray.core.posterior import ItemScorer
from l2d_ray.errors import InputError
from l2d_ray.index.engine import CandidateIndex, engine
from l2d_ray.index.files import REMEDY, read_array, read_bytes
from l2d_ray.index.manifest import PosteriorRecord, SegmentRecord, ShardRecord
from l2d_ray.index.posterior import open_scorer
from l2d_ray.index.vector_search import VectorSearch
from l2d_ray.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows of one shard, which shards of several indexes may share."""

    rows: VectorSearch
    row_items_M: NDArray[np.int32]
    sample_ids_M: IntArray

    @classmethod
    def open(
        cls, workspace: Workspace, record: SegmentRecord, offset_D: Float64, search: str, verify: bool
    ) -> "Segment":
        """Read a segment, as `IndexShard.open` says. An exhaustive search needs no setting."""
        shapes = {"rows": (record.rows, offset_D.size), "row_items": (record.rows,), "sample_ids": (record.rows,)}
        arrays = {name: read_array(workspace, record.files[name], shape, verify) for name, shape in shapes.items()}
        rows = VectorSearch(_read_candidates(workspace, record, offset_D.size), arrays["rows"], offset_D)
        segment = cls(rows, arrays["row_items"], arrays["sample_ids"])
        segment.set_search(search)
        return segment

    def set_search(self, search: str) -> None:
        """Search with this setting from now on, unless the search is exhaustive anyway."""
        if not self.rows.candidates.exhaustive:
            self.rows.set_search(search)


OpenSegments = MutableMapping[tuple[str, str], Segment]
"""Segments that are open in this process, by the digest of their record and their search setting."""


def open_segments() -> OpenSegments:
    """Return a mapping that holds a segment as long as a shard does."""
    return WeakValueDictionary()


@dataclass(frozen=True)
class IndexShard:
    """Rows and item means of one shard, in the index's space. Queries are [U, D], mapped into it already."""

    segments: Sequence[Segment]
    """The base, then the others."""
    centroids: VectorSearch
    items_I: NDArray[np.int32]
    """Items that have rows in this shard, ascending."""
    counts_I: Amounts
    """Number of rows of each item, or the sum of their weights (`core.decay`)."""
    scorer: ItemScorer | None = None
    """The scores of the aggregation `posterior`; None if its parameters were not fitted."""

    @classmethod
    def open(
        cls,
        workspace: Workspace,
        shard: ShardRecord,
        offset_D: Float64,
        search: str = "",
        verify: bool = False,
        posterior: PosteriorRecord | None = None,
        opened: OpenSegments | None = None,
    ) -> "IndexShard":
        """Read a shard. Raises InputError, naming the file, if one is missing, truncated or of another shape.

        `offset_D` is what `read_map` returns with the map, `search` the setting in the manifest. `verify` also
        compares every file with its checksum. Segments that are in `opened` are not read again; others enter it.
        """
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("items", "counts"), (shard.items,))
        shapes["centroids"] = shard.items, offset_D.size
        arrays = {name: read_array(workspace, shard.files[name], shape, verify) for name, shape in shapes.items()}
        opened, segments = {} if opened is None else opened, []
        for record in shard.segments:
            key = record.digest(), search
            segment = opened.get(key) or Segment.open(workspace, record, offset_D, search, verify)
            opened[key] = segment
            segments.append(segment)
        scorer = None
        if posterior:
            scorer = open_scorer(workspace, posterior, shard.shard, offset_D, verify)
        return cls(
            segments=segments,
            centroids=VectorSearch.over(arrays["centroids"], offset_D),
            items_I=arrays["items"],
            counts_I=arrays["counts"],
            scorer=scorer,
        )

    @cached_property
    def starts(self) -> IntArray:
        """Number of the first row of each segment, and the number of all rows."""
        return np.cumsum([0, *(segment.sample_ids_M.size for segment in self.segments)])

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.starts[-1])

    def with_prior(self, weight: float, rows: int) -> "IndexShard":
        """Return the shard with a prior for L2D-G: -1/2 d^2 + weight * log n_v, written as a distance.

        `rows` is the number of rows of all shards. A weight of 0 changes nothing.
        """
        if not weight:
            return self
        extra = 2 * weight * np.log(rows / self.counts_I)
        return replace(self, centroids=VectorSearch.over(self.centroids.vectors_ND, self.centroids.offset_D, extra))

    def nearest_rows(self, queries_UD: FloatArray, top_m: int) -> list[Neighbours]:
        """Return each query's top M rows of this shard."""
        found = [segment.rows.search(queries_UD, top_m) for segment in self.segments]
        results = []
        for of_query in zip(*found, strict=True):
            parts = list(zip(self.segments, self.starts[:-1], of_query, strict=True))
            results.append(
                nearest(
                    distances_M=np.concatenate([distances for _, _, (_, distances) in parts]),
                    sample_ids_M=np.concatenate([segment.sample_ids_M[rows] for segment, _, (rows, _) in parts]),
                    rows_M=np.concatenate([rows + start for _, start, (rows, _) in parts]),
                    count=top_m,
                )
            )
        return results

    def read_rows(self, rows_M: IntArray) -> tuple[FloatArray, NDArray[np.int32], IntArray]:
        """Return the vectors [M, D], the items and the sample ids of rows, given their numbers."""
        segment_M = np.searchsorted(self.starts, rows_M, side="right") - 1
        vectors_MD = np.empty((rows_M.size, self.centroids.offset_D.size), np.float16)
        items_M, sample_ids_M = np.empty(rows_M.size, np.int32), np.empty(rows_M.size, np.int64)
        for number, segment in enumerate(self.segments):
            here_M = segment_M == number
            rows = rows_M[here_M] - self.starts[number]
            vectors_MD[here_M] = segment.rows.vectors_ND[rows]
            items_M[here_M], sample_ids_M[here_M] = segment.row_items_M[rows], segment.sample_ids_M[rows]
        return vectors_MD, items_M, sample_ids_M


def _read_candidates(workspace: Workspace, segment: SegmentRecord, dimension: int) -> CandidateIndex:
    file = segment.files["faiss"]
    path = workspace.path(file.path)
    try:
        index = engine.from_bytes(read_bytes(workspace, file))
    except ValueError as error:
        raise InputError(
            f"{path}: {engine.NAME} {engine.VERSION} cannot read it ({error}); it was written by {engine.NAME}"
            f" {segment.faiss_version}; install that version or a newer one, or delete the folders in index/ and run"
            " jobs/build_index.py again"
        ) from None
    if (index.dimension, index.count) != (dimension, segment.rows):
        raise InputError(
            f"{path}: {index.count} vectors of dimension {index.dimension}, expected {segment.rows} of"
            f" {dimension}{REMEDY}"
        )
    return index
