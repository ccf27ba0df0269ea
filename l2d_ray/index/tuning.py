"""The search setting of an index: the cheapest that reaches a target recall, and the recall that it reaches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import Neighbours, best_items, last_row
from l2d_ray.index.aggregations.l2d_local import average_rows
from l2d_ray.index.exchange import Exchange, Request, run
from l2d_ray.index.manifest import IndexQuality
from l2d_ray.index.shard import IndexShard
from l2d_ray.index.vector_search import VectorSearch

QUALITY_QUERIES, QUALITY_K = 200, 20
QUALITY_TOP_MS = 1000, 200, 20
"""Values of M, from the largest that jobs/evaluate.py tries to the smallest. Many rows are spread over more of the
index; of few rows each counts for more."""


EXACT = "", IndexQuality(queries=0, top_m=QUALITY_TOP_MS[-1], recall_top_m=1, k=QUALITY_K, recall_top_k=1)
"""The setting and quality of an exhaustive index, which nothing can change."""


def tune(shards: Sequence[IndexShard], target: float) -> tuple[str, IndexQuality]:
    """Tune shards in this process, as `find_setting` does. The setting that it returns stays in force."""
    return run(find_setting([shard.num_rows for shard in shards], target), shards)


def find_setting(rows: Sequence[int], target: float) -> Exchange[tuple[str, IndexQuality]]:
    """Find a setting whose top K agrees with that of an exact search to `target` at every M of QUALITY_TOP_MS.

    `rows` are the numbers of rows of the shards. Queries are rows of the memory, and no row is its own neighbour. The
    search starts with the narrowest setting and takes the step that gains most until the target is reached. If it is
    out of reach, the best setting tried is taken.

    Returns the setting, which stays in force, and the quality at the M where it is lowest.
    """
    sampled = yield Request(sample_rows, (max(1, sum(rows) // QUALITY_QUERIES),))
    queries_UD, sample_ids_U = (np.concatenate(parts) for parts in zip(*sampled, strict=True))
    trial = _Trial(queries_UD, sample_ids_U)
    exact = yield from trial.search_exactly()
    largest = int(np.argmax(rows))

    def measure(setting: str) -> Exchange[IndexQuality]:
        yield Request(set_search, (setting,))
        qualities = []
        for top_m, best in exact.items():
            qualities.append(_quality(top_m, (yield from trial.search(top_m)), best))
        return min(qualities, key=_gain)

    setting = (yield Request(narrowest_search))[largest]
    tried = {setting: (yield from measure(setting))}
    while tried[setting].recall_top_k < target:
        options = (yield Request(wider_searches, (setting,)))[largest]
        if not options:
            break
        for option in options:
            tried[option] = yield from measure(option)
        setting = max(options, key=lambda option: _gain(tried[option]))
    best = setting if tried[setting].recall_top_k >= target else max(tried, key=lambda option: _gain(tried[option]))
    yield Request(set_search, (best,))
    return best, tried[best]


@dataclass(frozen=True)
class _Found:
    """The result of one query, its own row left out."""

    distances_M: Float64
    """Squared distances of its top M rows."""
    tied: bool
    """Whether another row is as near as the M-th, so that only their sample ids decide which of them counts."""
    items_K: IntArray
    """Its top K items by L2D-L."""


@dataclass(frozen=True)
class _Trial:
    """Queries with which settings are compared: rows of the memory, and their sample ids."""

    queries_UD: FloatArray
    sample_ids_U: IntArray

    def search_exactly(self) -> Exchange[dict[int, list[_Found]]]:
        """Return by M what a scan of all rows finds: one scan with the largest M, cut to the others."""
        near = yield self._request(scan_other_rows, max(QUALITY_TOP_MS) + 1)  # one more, to see ties
        results = {}
        for top_m in QUALITY_TOP_MS:
            first = [[neighbours.first(top_m + 1) for neighbours in of_shard] for of_shard in near]
            results[top_m] = yield from self._found(first, top_m)
        return results

    def search(self, top_m: int) -> Exchange[list[_Found]]:
        """Return what the index finds with its present setting."""
        near = yield self._request(other_rows, top_m)
        return (yield from self._found(near, top_m))

    def _request(self, function: Callable[..., Any], count: int) -> Request:
        return Request(function, (self.queries_UD, self.sample_ids_U, count))

    def _found(self, near: Sequence[Sequence[Neighbours]], top_m: int) -> Exchange[list[_Found]]:
        by_query = list(zip(*near, strict=True))
        last_rows = [last_row(neighbours, top_m) for neighbours in by_query]
        items = yield Request(average_rows, (self.queries_UD, last_rows), per_shard=near)
        return [
            _Found(
                distances_M=np.concatenate([part.up_to(last).distances_M for part in parts]),
                tied=sum(int((part.distances_M <= last.distance).sum()) for part in parts) > top_m,
                items_K=best_items(lists, QUALITY_K).items_I,
            )
            for last, parts, lists in zip(last_rows, by_query, zip(*items, strict=True), strict=True)
        ]


def sample_rows(shard: IndexShard, step: int) -> tuple[FloatArray, IntArray]:
    """Return every `step`-th row of a shard, and their sample ids."""
    vectors_MD, _, sample_ids_M = shard.read_rows(np.arange(0, shard.num_rows, step))
    return vectors_MD, sample_ids_M


def narrowest_search(shard: IndexShard) -> str:
    """Return the setting of least effort."""
    return shard.segments[0].rows.candidates.narrowest_search()


def wider_searches(shard: IndexShard, setting: str) -> list[str]:
    """Return the settings one step wider."""
    return shard.segments[0].rows.wider_searches(setting)


def set_search(shard: IndexShard, setting: str) -> None:
    """Search the shard with this setting from now on."""
    for segment in shard.segments:
        segment.set_search(setting)


def other_rows(shard: IndexShard, queries_UD: FloatArray, sample_ids_U: IntArray, count: int) -> list[Neighbours]:
    """Return the nearest rows of a shard for queries that are rows themselves, each without its own row."""
    near = shard.nearest_rows(queries_UD, count + 1)
    return [part.keep(part.sample_ids_M != itself) for part, itself in zip(near, sample_ids_U, strict=True)]


def scan_other_rows(shard: IndexShard, queries_UD: FloatArray, sample_ids_U: IntArray, count: int) -> list[Neighbours]:
    """Return the same from a scan of all rows."""
    scans = [VectorSearch.scan(segment.rows.vectors_ND, segment.rows.offset_D) for segment in shard.segments]
    parts = zip(shard.segments, scans, strict=True)
    exact = replace(shard, segments=[replace(segment, rows=scan) for segment, scan in parts])
    return other_rows(exact, queries_UD, sample_ids_U, count)


def _quality(top_m: int, found: Sequence[_Found], exact: Sequence[_Found]) -> IndexQuality:
    pairs = list(zip(found, exact, strict=True))
    recall_top_m = _share(
        sum((one.distances_M <= best.distances_M.max(initial=0)).sum() for one, best in pairs),
        sum(best.distances_M.size for _, best in pairs),
    )
    untied = [(one, best) for one, best in pairs if not best.tied]
    recall_top_k = _share(
        sum(np.isin(one.items_K, best.items_K).sum() for one, best in untied),
        sum(best.items_K.size for _, best in untied),
    )
    return IndexQuality(
        queries=len(pairs),
        top_m=top_m,
        recall_top_m=recall_top_m,
        k=QUALITY_K,
        recall_top_k=recall_top_k if untied else recall_top_m,  # if all are tied, items cannot be compared
    )


def _gain(quality: IndexQuality) -> tuple[float, float]:
    return quality.recall_top_k, quality.recall_top_m


def _share(hits: int, wanted: int) -> float:
    return round(int(hits) / wanted, 5) if wanted else 1.0
