"""One shard of an index: its files, and the search for the rows near a query."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import Neighbours, nearest
from l2d_ray.core.posterior import ItemScorer
from l2d_ray.errors import InputError
from l2d_ray.index.engine import CandidateIndex, engine
from l2d_ray.index.files import REMEDY, read_array, read_bytes
from l2d_ray.index.manifest import PosteriorRecord, ShardRecord
from l2d_ray.index.posterior import open_scorer
from l2d_ray.index.vector_search import VectorSearch
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class IndexShard:
    """Rows and item means of one shard, in the index's space. Queries are [U, D], mapped into it already."""

    rows: VectorSearch
    row_items_M: NDArray[np.int32]
    sample_ids_M: IntArray
    centroids: VectorSearch
    items_I: NDArray[np.int32]
    """Items that have rows in this shard, ascending."""
    counts_I: IntArray
    """Number of rows of each item."""
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
    ) -> "IndexShard":
        """Read a shard. Raises InputError, naming the file, if one is missing, truncated or of another shape.

        `offset_D` is what `read_map` returns with the map, `search` the setting in the manifest. `verify` also
        compares every file with its checksum.
        """
        dimension = offset_D.size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("row_items", "sample_ids"), (shard.rows,))
        shapes |= dict.fromkeys(("items", "counts"), (shard.items,))
        shapes |= {"rows": (shard.rows, dimension), "centroids": (shard.items, dimension)}
        arrays = {name: read_array(workspace, shard.files[name], shape, verify) for name, shape in shapes.items()}
        rows = VectorSearch(_read_candidates(workspace, shard, dimension), arrays["rows"], offset_D)
        rows.set_search(search)
        scorer = None
        if posterior:
            scorer = open_scorer(workspace, posterior, shard.shard, offset_D, verify)
        return cls(
            rows=rows,
            row_items_M=arrays["row_items"],
            sample_ids_M=arrays["sample_ids"],
            centroids=VectorSearch.over(arrays["centroids"], offset_D),
            items_I=arrays["items"],
            counts_I=arrays["counts"],
            scorer=scorer,
        )

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
        return [
            nearest(distances_M, self.sample_ids_M[rows_M], rows_M, top_m)
            for rows_M, distances_M in self.rows.search(queries_UD, top_m)
        ]


def _read_candidates(workspace: Workspace, shard: ShardRecord, dimension: int) -> CandidateIndex:
    file = shard.files["faiss"]
    path = workspace.path(file.path)
    try:
        index = engine.from_bytes(read_bytes(workspace, file))
    except ValueError as error:
        raise InputError(
            f"{path}: {engine.NAME} {engine.VERSION} cannot read it ({error}); it was written by {engine.NAME}"
            f" {shard.faiss_version}; install that version or a newer one, or delete the folder of this index and run"
            " jobs/build_index.py again"
        ) from None
    if (index.dimension, index.count) != (dimension, shard.rows):
        raise InputError(
            f"{path}: {index.count} vectors of dimension {index.dimension}, expected {shard.rows} of"
            f" {dimension}{REMEDY}"
        )
    return index
