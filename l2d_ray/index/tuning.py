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
from l2d_ray.index.shard import IndexShard
from l2d_ray.index.sharding import Hop, run

QUALITY_QUERIES, QUALITY_TOP_M, QUALITY_K = 200, 200, 20


class TrialShard:
    """A shard that can also be searched exactly, and whose search setting can be changed. Answers `tuning_hops`."""

    def __init__(self, shard: IndexShard) -> None:
        """The setting of the shard's own index is changed."""
        self._shard = shard
        self._exact = replace(shard, rows=VectorSearch.scan(shard.rows.vectors_ND, shard.rows.offset_D))

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
    """A search setting whose top K agrees with the exact one to `target`, and what it gives; `rows` is of each shard.

    From the narrowest on, the step that gains most is taken until the target is reached; if it is out of reach, the
    best of all that was tried is taken. It stays in force. Queries are rows of the memory, each left out of its own
    neighbours. Asks `TrialShard`s.
    """
    largest = int(np.argmax(rows))
    sampled = yield _all(rows, "sample", max(1, sum(rows) // QUALITY_QUERIES))
    queries, own_ids = (np.concatenate(parts) for parts in zip(*sampled, strict=True))
    exact = yield from _lists(rows, queries, own_ids, exact=True)
    rows_wanted = sum(best.near_M.size for best in exact)
    items_wanted = sum(best.items_K.size for best in exact if not best.tied)

    def search(setting: str) -> Generator[Hop, list[Any], IndexQuality]:
        yield _all(rows, "set_search", setting)
        found = yield from _lists(rows, queries, own_ids, exact=False)
        pairs = list(zip(found, exact, strict=True))
        clear = [(own, best) for own, best in pairs if not best.tied]
        return IndexQuality(
            queries=len(queries),
            top_m=QUALITY_TOP_M,
            recall_top_m=_share([(own.near_M <= best.near_M.max(initial=0)).sum() for own, best in pairs], rows_wanted),
            k=QUALITY_K,
            recall_top_k=_share([np.isin(own.items_K, best.items_K).sum() for own, best in clear], items_wanted),
        )

    setting = (yield _all(rows, "narrowest_search"))[largest]
    tried = {setting: (yield from search(setting))}

    def gain(setting: str) -> tuple[float, float]:
        return tried[setting].recall_top_k, tried[setting].recall_top_m

    while gain(setting)[0] < target:
        options = (yield _all(rows, "wider_searches", setting))[largest]
        if not options:
            break
        for option in options:
            tried[option] = yield from search(option)
        setting = max(options, key=gain)
    best = max(tried, key=gain) if gain(setting)[0] < target else setting
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
    shards: Sequence[Any], queries_UD: NDArray[np.float16], own_ids_U: IntArray, exact: bool
) -> Generator[Hop, list[Any], list[_Found]]:
    near = yield _all(shards, "nearest_rows", queries_UD, own_ids_U, QUALITY_TOP_M, exact)
    of_query = list(zip(*near, strict=True))
    cuts = [global_cut(parts, QUALITY_TOP_M) for parts in of_query]
    items = yield Hop("aggregate_rows", [(queries_UD, own, cuts) for own in near])
    return [
        _Found(
            near_M=np.concatenate([part.up_to(cut).distances_M for part in parts]),
            tied=sum(int((part.distances_M <= cut[0]).sum()) for part in parts) > QUALITY_TOP_M,
            items_K=best_items(found, QUALITY_K).items_I,
        )
        for cut, parts, found in zip(cuts, of_query, zip(*items, strict=True), strict=True)
    ]


def _share(hits: Sequence[int], wanted: int) -> float:
    return round(sum(map(int, hits)) / wanted, 5) if wanted else 1.0
