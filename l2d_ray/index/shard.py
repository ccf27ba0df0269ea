"""One shard of an index: its files, and the two hops of L2D-L and the one of L2D-G over its own rows and items."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.decoding import (
    Cut,
    Float64,
    FloatArray,
    IntArray,
    Neighbours,
    ScoredItems,
    aggregate,
    best_items,
    nearest,
    scores_of,
)
from l2d_ray.errors import InputError
from l2d_ray.index.faiss_index import EXHAUSTIVE, VectorSearch, from_bytes
from l2d_ray.index.files import REMEDY, read_array, read_bytes
from l2d_ray.index.manifest import ShardRecord
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class IndexShard:
    """Rows and item means of one shard, in the index's space. Queries are [U, D], mapped already."""

    rows: VectorSearch
    row_items_M: NDArray[np.int32]
    sample_ids_M: IntArray
    centroids: VectorSearch
    items_I: NDArray[np.int32]
    """The items that have rows here, ascending."""
    counts_I: IntArray
    """Rows of each."""

    @classmethod
    def open(
        cls,
        workspace: Workspace,
        shard: ShardRecord,
        offset_D: Float64,
        factory: str,
        search: str = "",
        verify: bool = False,
    ) -> "IndexShard":
        """Read a shard. Raises InputError, naming the file, if one is missing, truncated or of another shape.

        `offset_D` is what `read_map` returns with the map; `factory` and `search` are as in the manifest; `verify` as
        in `read_array`.
        """
        dimension = offset_D.size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("row_items", "sample_ids"), (shard.rows,))
        shapes |= dict.fromkeys(("items", "counts"), (shard.items,))
        shapes |= {"rows": (shard.rows, dimension), "centroids": (shard.items, dimension)}
        arrays = {name: read_array(workspace, shard.files[name], shape, verify) for name, shape in shapes.items()}
        index = _read_faiss(workspace, shard, dimension)
        rows = VectorSearch(index, arrays["rows"], offset_D, exhaustive=factory == EXHAUSTIVE)
        rows.set_search(search)
        return cls(
            rows=rows,
            row_items_M=arrays["row_items"],
            sample_ids_M=arrays["sample_ids"],
            centroids=VectorSearch.over(arrays["centroids"], offset_D),
            items_I=arrays["items"],
            counts_I=arrays["counts"],
        )

    def with_prior(self, weight: float, rows: int) -> "IndexShard":
        """The shard whose L2D-G weighs log-frequency, -1/2 d^2 + weight * log n_v, written as a distance.

        `rows` is the number of rows of all shards. A weight of 0 changes nothing.
        """
        if not weight:
            return self
        extra = 2 * weight * np.log(rows / self.counts_I)
        return replace(self, centroids=VectorSearch.over(self.centroids.vectors_ND, self.centroids.offset_D, extra))

    def nearest_rows(self, queries_UD: FloatArray, top_m: int) -> list[Neighbours]:
        """L2D-L, first hop: each query's own top M rows of this shard."""
        return [
            nearest(distances_M, self.sample_ids_M[rows_M], rows_M, top_m)
            for rows_M, distances_M in self.rows.search(queries_UD, top_m)
        ]

    def aggregate_rows(
        self, queries_UD: FloatArray, neighbours: Sequence[Neighbours], cuts: Sequence[Cut]
    ) -> list[ScoredItems]:
        """L2D-L, second hop: for each query the items of the rows that survive its cut, scored by their means."""
        kept = [own.up_to(cut).rows_M for own, cut in zip(neighbours, cuts, strict=True)]
        return [
            aggregate(query_D, self.rows.vectors_ND[rows_M], self.row_items_M[rows_M])
            for query_D, rows_M in zip(queries_UD, kept, strict=True)
        ]

    def nearest_items(
        self, queries_UD: FloatArray, k: int, exclude: Sequence[IntArray], allow: IntArray | None = None
    ) -> list[ScoredItems]:
        """L2D-G: each query's top K items of this shard, without its excluded ones and within `allow`."""
        if allow is not None:
            allowed = np.flatnonzero(np.isin(self.items_I, allow))
            none = np.empty(0, np.int64)
            within = [allowed if np.isfinite(query_D).all() else none for query_D in queries_UD]
            found = [(own, self.centroids.distances(q, own)) for q, own in zip(queries_UD, within, strict=True)]
        else:
            most = max((excluded.size for excluded in exclude), default=0)
            found = self.centroids.search(queries_UD, k + most)
        scored = (ScoredItems(self.items_I[numbers].astype(np.int64), scores_of(d)) for numbers, d in found)
        return [best_items([items.permitted(out)], k) for items, out in zip(scored, exclude, strict=True)]


@dataclass(frozen=True)
class SearchedOnce(IndexShard):
    """A shard that answers the first hop of L2D-L for several M, of which the largest is asked first, from one search.

    An approximate index may then find a little more for a smaller M than it does when asked for that alone.
    """

    last: dict[str, Any] = field(default_factory=dict, repr=False)
    """The search: `queries`, `top_m` and what it `found`."""

    def nearest_rows(self, queries_UD: FloatArray, top_m: int) -> list[Neighbours]:
        """As in `IndexShard`."""
        last = self.last
        if not last or top_m > last["top_m"] or not np.array_equal(queries_UD, last["queries"]):
            last |= {"queries": queries_UD, "top_m": top_m, "found": super().nearest_rows(queries_UD, top_m)}
        return [found.first(top_m) for found in last["found"]]


def _read_faiss(workspace: Workspace, shard: ShardRecord, dimension: int) -> Any:
    file = shard.files["faiss"]
    path = workspace.path(file.path)
    try:
        index = from_bytes(read_bytes(workspace, file))
    except ValueError as error:
        raise InputError(
            f"{path}: FAISS {faiss.__version__} cannot read it ({error}); it was written by FAISS"
            f" {shard.faiss_version}: install that or a newer one, or delete the folder of this"
            " index and run jobs/build_index.py again"
        ) from None
    if (index.d, index.ntotal) != (dimension, shard.rows):
        raise InputError(
            f"{path}: {index.ntotal} vectors of dimension {index.d}, expected {shard.rows} of {dimension}{REMEDY}"
        )
    return index
