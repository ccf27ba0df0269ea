"""How much an index loses against looking at every row, and a setting that keeps it small without much effort."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.decoding import Cut, Float64, FloatArray, IntArray, Neighbours, ScoredItems, best_items, global_cut
from l2d_ray.index import faiss_index
from l2d_ray.index.faiss_index import VectorSearch
from l2d_ray.index.manifest import IndexQuality
from l2d_ray.index.shard import IndexShard, SearchedOnce
from l2d_ray.index.sharding import Hop, run

QUALITY_QUERIES, QUALITY_K = 200, 20
QUALITY_TOP_M = 1000, 200, 20
"""M, from the largest that jobs/evaluate.py tries to the smallest: many rows lie in more of the index, and of few each
counts for more."""


class TrialShard:
    """A shard that can also be searched exactly, and whose search setting can be changed. Answers `tuning_hops`."""

    def __init__(self, shard: IndexShard) -> None:
        """The setting of the shard's own index is changed."""
        self._shard = shard
        exact = replace(shard, rows=VectorSearch.scan(shard.rows.vectors_ND, shard.rows.offset_D))
        self._exact = SearchedOnce(**vars(exact))

    def sample(self, step: int) -> tuple[NDArray[np.float16], IntArray]:
        """Every so many rows, and their ids."""
        rows = slice(0, None, step)
        return np.array(self._shard.rows.vectors_ND[rows]), self._shard.sample_ids_M[rows]

    def narrowest_search(self) -> str:
        """As in `faiss_index`."""
        return faiss_index.narrowest_search(self._shard.rows.index)

    def wider_searches(self, setting: str) -> list[str]:
        """As in `faiss_index`."""
        return faiss_index.wider_searches(self._shard.rows.index, setting)

    def set_search(self, setting: str) -> None:
        """As in `VectorSearch`."""
        self._shard.rows.set_search(setting)

    def nearest_rows(self, queries_UD: FloatArray, own_ids_U: IntArray, top_m: int, exact: bool) -> list[Neighbours]:
        """Each query's top M rows of this shard, without its own; of the exact ones one more, to see ties."""
        near = (self._exact if exact else self._shard).nearest_rows(queries_UD, top_m + 1 + exact)
        return [part.keep(part.sample_ids_M != own_id) for part, own_id in zip(near, own_ids_U, strict=True)]

    def aggregate_rows(
        self, queries_UD: FloatArray, neighbours: Sequence[Neighbours], cuts: Sequence[Cut]
    ) -> list[ScoredItems]:
        """As in `IndexShard`."""
        return self._shard.aggregate_rows(queries_UD, neighbours, cuts)


def tune(shards: Sequence[IndexShard], target: float) -> tuple[str, IndexQuality]:
    """`tuning_hops` over shards of this process, whose setting it changes to what it returns."""
    return run(tuning_hops([shard.sample_ids_M.size for shard in shards], target), [TrialShard(s) for s in shards])


def tuning_hops(rows: Sequence[int], target: float) -> Generator[Hop, list[Any], tuple[str, IndexQuality]]:
    """A search setting whose top K agrees with the exact one to `target` at any M of `QUALITY_TOP_M`, and what it gives
    where it gives least; `rows` is of each shard.

    From the narrowest on, the step that gains most is taken until the target is reached; if it is out of reach, the
    best of all that was tried is taken. It stays in force. Queries are rows of the memory, each left out of its own
    neighbours. Asks `TrialShard`s.
    """
    largest = int(np.argmax(rows))
    sampled = yield _all(rows, "sample", max(1, sum(rows) // QUALITY_QUERIES))
    queries, own_ids = (np.concatenate(parts) for parts in zip(*sampled, strict=True))
    exact = {}
    for top_m in QUALITY_TOP_M:
        exact[top_m] = yield from _lists(rows, queries, own_ids, top_m, exact=True)

    def search(setting: str) -> Generator[Hop, list[Any], IndexQuality]:
        yield _all(rows, "set_search", setting)
        of_each_m = []
        for top_m, best in exact.items():
            found = yield from _lists(rows, queries, own_ids, top_m, exact=False)
            of_each_m.append(_quality(top_m, found, best))
        return min(of_each_m, key=_gain)

    setting = (yield _all(rows, "narrowest_search"))[largest]
    tried = {setting: (yield from search(setting))}

    while tried[setting].recall_top_k < target:
        options = (yield _all(rows, "wider_searches", setting))[largest]
        if not options:
            break
        for option in options:
            tried[option] = yield from search(option)
        setting = max(options, key=lambda option: _gain(tried[option]))
    best = setting if tried[setting].recall_top_k >= target else max(tried, key=lambda one: _gain(tried[one]))
    yield _all(rows, "set_search", best)
    return best, tried[best]


def _all(shards: Sequence[Any], method: str, *arguments: Any) -> Hop:
    """The same question to every shard."""
    return Hop(method, [arguments] * len(shards))


@dataclass(frozen=True)
class _Found:
    """What one query found, its own row left out."""

    near_M: Float64
    """Squared distances of its top M rows."""
    tied: bool
    """Whether another row is as near as the last of them: which of the two counts is for their ids to say."""
    items_K: IntArray
    """Its top K items by L2D-L."""


def _lists(
    shards: Sequence[Any], queries_UD: NDArray[np.float16], own_ids_U: IntArray, top_m: int, exact: bool
) -> Generator[Hop, list[Any], list[_Found]]:
    near = yield _all(shards, "nearest_rows", queries_UD, own_ids_U, top_m, exact)
    of_query = list(zip(*near, strict=True))
    cuts = [global_cut(parts, top_m) for parts in of_query]
    items = yield Hop("aggregate_rows", [(queries_UD, own, cuts) for own in near])
    return [
        _Found(
            near_M=np.concatenate([part.up_to(cut).distances_M for part in parts]),
            tied=sum(int((part.distances_M <= cut[0]).sum()) for part in parts) > top_m,
            items_K=best_items(found, QUALITY_K).items_I,
        )
        for cut, parts, found in zip(cuts, of_query, zip(*items, strict=True), strict=True)
    ]


def _quality(top_m: int, found: Sequence[_Found], exact: Sequence[_Found]) -> IndexQuality:
    pairs = list(zip(found, exact, strict=True))
    recall_top_m = _share(
        sum((own.near_M <= best.near_M.max(initial=0)).sum() for own, best in pairs),
        sum(best.near_M.size for _, best in pairs),
    )
    clear = [(own, best) for own, best in pairs if not best.tied]
    recall_top_k = _share(
        sum(np.isin(own.items_K, best.items_K).sum() for own, best in clear),
        sum(best.items_K.size for _, best in clear),
    )
    return IndexQuality(
        queries=len(pairs),
        top_m=top_m,
        recall_top_m=recall_top_m,
        k=QUALITY_K,
        recall_top_k=recall_top_k if clear else recall_top_m,  # where all are tied, only the rows can tell
    )


def _gain(quality: IndexQuality) -> tuple[float, float]:
    return quality.recall_top_k, quality.recall_top_m


def _share(hits: int, wanted: int) -> float:
    return round(int(hits) / wanted, 5) if wanted else 1.0
