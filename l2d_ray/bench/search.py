"""Benchmark of the search: latency, recall and bytes of indexes of synthetic memories, and estimates for 1e9 rows.

Rows are clustered like hidden states: items around topics, rows around items, in float16. Every index is searched
through the code that serves it, and next to that through the engine alone: one query at a time, on the same threads.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.moments import add_rows
from l2d_ray.core.posterior import FLOOR, ItemScorer, Parameters
from l2d_ray.core.query import Query
from l2d_ray.core.samples import item_shards, sample_ids
from l2d_ray.core.space import LinearMap
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.distributed.progress import Progress
from l2d_ray.index.engine import CandidateIndex, engine
from l2d_ray.index.posterior import shard_items
from l2d_ray.index.shard import IndexShard, Segment
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.index.tuning import tune
from l2d_ray.index.vector_search import VectorSearch

ROWS_PER_ITEM = 50
TOP_M, K = 200, 20
LARGEST_FLAT_BYTES = 6 << 30
ROWS_PER_BLOCK = 50_000
HISTORY, ITEMS_PER_USER = 10, 50


@dataclass(frozen=True)
class SearchBenchmark:
    """Measurements of every index, and estimates from them."""

    results: list[dict[str, Any]]
    """One row per index. `index` is the complete factory string, `search` the setting that reaches index.target_recall.

    `bytes_per_row` includes float16 rows and ids. `local_ms`, `global_ms` and `posterior_ms` are medians of one query
    by L2D-L, by L2D-G and by probability. `faiss_ms` is the median of FAISS alone finding the top M. `local_over_faiss`
    and `posterior_over_global` are the median ratios of the pairs."""
    extrapolated: list[dict[str, Any]]
    """Estimates for 1e9 rows on one shard, from the largest measured size of each factory on one shard. Bytes grow with
    the rows, milliseconds with the rows that are scanned: all of Flat, and about their square root of IVF."""
    dimension: int
    threads: int


def bench_search(config: Config) -> SearchBenchmark:
    """Build and search every combination of `bench.factories`, `bench.rows` and `bench.shards`."""
    bench, threads = config.bench, config.bench.threads or config.workers.cpus
    engine.set_threads(threads)
    results = []
    sizes = [(rows, factory) for rows in sorted(bench.rows) for factory in bench.factories]
    fitting = [size for size in sizes if _fits(*size, bench.dimension)]
    with Progress(len(fitting), "build and search", "indexes") as bar:
        for rows, name in fitting:
            with tempfile.TemporaryDirectory() as folder:
                memory = _Memory.make(Path(folder), rows, bench.dimension)
                for shards in bench.shards:
                    factory = engine.complete_factory(name, rows // shards, bench.dimension)
                    measured = _measure(config, memory, factory, shards)
                    results.append({"rows": rows, "factory": name, **measured})
            bar.advance()
    return SearchBenchmark(results, _extrapolate(results), bench.dimension, threads)


@dataclass(frozen=True)
class _Memory:
    """Synthetic rows on disk, like those of an index, and queries."""

    rows_MD: NDArray[np.float16]
    items_M: NDArray[np.int32]
    queries_UD: FloatArray
    histories_UH: NDArray[np.int32]

    @property
    def interactions(self) -> TrainingInteractions:
        """The rows as histories of 50 items."""
        offsets = np.append(np.arange(0, self.items_M.size, ITEMS_PER_USER), self.items_M.size)
        is_target = np.ones(self.items_M.size, np.bool_)
        is_target[offsets[:-1]] = False
        return TrainingInteractions(self.items_M, np.zeros(self.items_M.size, np.int64), offsets, is_target)

    @classmethod
    def make(cls, folder: Path, rows: int, dimension: int, queries: int = 100) -> "_Memory":
        random = np.random.default_rng(0)
        num_items = max(rows // ROWS_PER_ITEM, 1)
        topics = random.standard_normal((max(num_items // 50, 1), dimension), np.float32)
        items = topics[random.integers(0, len(topics), num_items)]
        items += random.standard_normal(items.shape, np.float32)
        items_M = (num_items * random.random(rows) ** 2).astype(np.int32)  # some items are popular
        states = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (rows, dimension))
        for block in _blocks(rows):
            of_block = items[items_M[block]]
            states[block] = of_block + random.standard_normal(of_block.shape, np.float32)
        of_queries = items[items_M[random.integers(0, rows, queries)]]
        queries_UD = of_queries + random.standard_normal(of_queries.shape, np.float32)
        return cls(states, items_M, queries_UD, random.choice(items_M, (queries, HISTORY)))


def _measure(config: Config, memory: _Memory, factory: str, num_shards: int) -> dict[str, Any]:
    started = time.perf_counter()
    indexes, shards = zip(*_shards(memory, factory, num_shards), strict=True)
    seconds = time.perf_counter() - started
    search, quality = tune(shards, config.index.target_recall)
    ours, queries = ShardedIndex(LinearMap(), shards), zip(memory.queries_UD, memory.histories_UH, strict=True)
    times = [_milliseconds(ours, indexes, query_D[None], history) for query_D, history in queries]
    by_local, by_global, by_posterior, by_engine = zip(*times, strict=True)
    stored = sum(len(index.to_bytes()) for index in indexes)
    ids = 4 + 8
    return {
        "index": factory,
        "shards": num_shards,
        "search": search,
        "recall_top_m": quality.recall_top_m,
        "recall_top_k": quality.recall_top_k,
        "build_seconds": round(seconds, 1),
        "bytes_per_row": round(stored / len(memory.rows_MD) + 2 * memory.rows_MD.shape[1] + ids, 1),
        "local_ms": round(median(by_local), 3),
        "global_ms": round(median(by_global), 3),
        "posterior_ms": round(median(by_posterior), 3),
        "faiss_ms": round(median(by_engine), 3),
        "local_over_faiss": _ratio(by_local, by_engine),
        "posterior_over_global": _ratio(by_posterior, by_global),
    }


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return round(median(one / other for one, other in zip(ours, others, strict=True)), 2)


def _shards(memory: _Memory, factory: str, num_shards: int) -> Iterator[tuple[CandidateIndex, IndexShard]]:
    """Yield the engine's index and the shard of each part of the memory; the index is trained once and copied."""
    dimension = memory.rows_MD.shape[1]
    empty = engine.create(factory, dimension)
    wanted = empty.training_rows()
    if wanted:
        step = max(1, len(memory.rows_MD) // wanted)
        empty.train(memory.rows_MD[::step].astype(np.float32))
    shard_of_M, num_items = item_shards(memory.items_M, num_shards), int(memory.items_M.max()) + 1
    for number in range(num_shards):
        rows_M = np.flatnonzero(shard_of_M == number) if num_shards > 1 else slice(None)
        index = engine.from_bytes(empty.to_bytes())
        targets_V = shard_items(num_items, num_shards, number)
        counts, parameters = TransitionCounts.count([memory.interactions], num_items, targets_V), Parameters()
        transitions, unseen_V = counts.weigh(parameters.lag_decay, FLOOR), counts.samples_V == 0
        shard = _shard(index, memory.rows_MD[rows_M], memory.items_M[rows_M], number)
        means_VD = np.zeros((targets_V.size, dimension), np.float32)
        means_VD[np.searchsorted(targets_V, shard.items_I)] = shard.centroids.vectors_ND
        scorer = ItemScorer(targets_V, means_VD, shard.centroids.offset_D, unseen_V, transitions, parameters)
        yield index, replace(shard, scorer=scorer)


def _shard(
    index: CandidateIndex, rows_MD: NDArray[np.float16], row_items_M: NDArray[np.int32], number: int
) -> IndexShard:
    """Add rows to an index, and return their shard."""
    offset_D = np.zeros(rows_MD.shape[1])
    items_I, places_M = np.unique(row_items_M, return_inverse=True)
    sums_ID, counts_I = np.zeros((items_I.size, offset_D.size)), np.zeros(items_I.size, np.int64)
    for block in _blocks(len(rows_MD)):
        index.add(rows_MD[block].astype(np.float32))
        add_rows(sums_ID, counts_I, rows_MD[block], places_M[block])
    ids_M = sample_ids(np.arange(len(rows_MD)), np.full(len(rows_MD), number))
    return IndexShard(
        segments=[Segment(VectorSearch(index, rows_MD, offset_D), row_items_M, ids_M)],
        centroids=VectorSearch.over((sums_ID / counts_I[:, None]).astype(np.float32), offset_D),
        items_I=items_I,
        counts_I=counts_I,
    )


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS_PER_BLOCK):
        yield slice(start, min(start + ROWS_PER_BLOCK, rows))


def _fits(rows: int, factory: str, dimension: int) -> bool:
    compressed = "PQ" in factory
    return compressed or rows * dimension * 4 <= LARGEST_FLAT_BYTES


def _milliseconds(
    ours: ShardedIndex, indexes: Sequence[CandidateIndex], query_1D: FloatArray, history: NDArray[np.int32]
) -> tuple[float, float, float, float]:
    """Time one query by L2D-L, by L2D-G, by probability, and by the engine alone for the top M of every shard."""
    query = query_1D.astype(np.float32)
    moments = [time.perf_counter()]
    for aggregation in ("local", "global", "posterior"):
        ours.recommend(query_1D, [Query(history, K, aggregation=aggregation, top_m=TOP_M)])
        moments.append(time.perf_counter())
    for index in indexes:
        index.search(query, TOP_M)
    moments.append(time.perf_counter())
    by_local, by_global, by_posterior, by_engine = 1000 * np.diff(moments)
    return by_local, by_global, by_posterior, by_engine


def _extrapolate(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    largest = {row["factory"]: row for row in results if row["shards"] == 1}
    growth = {factory: 1.0 if factory == "Flat" else 0.5 for factory in largest if factory.startswith(("Flat", "IVF"))}
    return [
        {
            "rows": 10**9,
            "factory": factory,
            "terabytes": round(largest[factory]["bytes_per_row"] * 1e9 / 1e12, 2),
            "local_ms": round(largest[factory]["local_ms"] * (1e9 / largest[factory]["rows"]) ** power, 1),
        }
        for factory, power in growth.items()
    ]
