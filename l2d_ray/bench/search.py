"""Search against size: latency, recall and bytes of the indexes of made-up memories, and what 1e9 rows would take.

Rows are clustered as hidden states are: items around topics, rows around items, in float16. Every index is searched
through the same code that serves it, and FAISS alone beside it, one query at a time, on the same threads.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from l2d_ray.config import Config
from l2d_ray.core.aggregation import add_rows
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.query import Query
from l2d_ray.core.samples import item_shards, sample_ids
from l2d_ray.core.space import LinearMap
from l2d_ray.index import faiss_index
from l2d_ray.index.faiss_index import EXHAUSTIVE, VectorSearch
from l2d_ray.index.shard import IndexShard
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.index.tuning import tune

ROWS_PER_ITEM = 50
TOP_M, K = 200, 20
LARGEST_FLAT_BYTES = 6 << 30
BLOCK = 50_000


@dataclass(frozen=True)
class SearchBenchmark:
    """One row of `results` an index."""

    results: list[dict[str, Any]]
    """`rows`, `factory`, `index` (the factory string in full), `shards`, `search` (the setting that reaches
    index.target_recall), `recall_top_m`, `recall_top_k`, `build_seconds`, `bytes_per_row` (with the float16 rows and
    ids), `local_ms` and `global_ms` (median of a query through L2D), `faiss_ms` (FAISS alone finding the top M),
    `local_over_faiss` (median of the pairs)."""
    extrapolated: list[dict[str, Any]]
    """1e9 rows on one shard, from the largest size of each factory that was measured on one: bytes in proportion to the
    rows, milliseconds to the rows that are looked at (all of Flat; of IVF so many lists, each of which grows with the
    square root)."""
    dimension: int
    threads: int


def bench_search(config: Config) -> SearchBenchmark:
    """Build and search every `bench.factories` over every `bench.rows`, in so many `bench.shards`."""
    bench, threads = config.bench, config.bench.threads or config.workers.cpus
    faiss.omp_set_num_threads(threads)
    results = []
    sizes = [(rows, factory) for rows in sorted(bench.rows) for factory in bench.factories]
    for rows, name in tqdm([size for size in sizes if _fits(*size, bench.dimension)], unit="index", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            memory = _Memory.make(Path(folder), rows, bench.dimension)
            results += [
                {"rows": rows, "factory": name, **_measure(config, memory, _sized(name, rows // n, bench.dimension), n)}
                for n in bench.shards
            ]
    return SearchBenchmark(results, _extrapolate(results), bench.dimension, threads)


@dataclass(frozen=True)
class _Memory:
    """Made-up rows, on the disk as an index has them."""

    rows_MD: NDArray[np.float16]
    items_M: NDArray[np.int32]
    queries_UD: FloatArray

    @classmethod
    def make(cls, folder: Path, rows: int, dimension: int, queries: int = 100) -> "_Memory":
        random = np.random.default_rng(0)
        num_items = max(rows // ROWS_PER_ITEM, 1)
        topics = random.standard_normal((max(num_items // 50, 1), dimension), np.float32)
        items = topics[random.integers(0, len(topics), num_items)]
        items += random.standard_normal(items.shape, np.float32)
        items_M = (num_items * random.random(rows) ** 2).astype(np.int32)  # some items are popular
        states = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (rows, dimension))
        for start in range(0, rows, BLOCK):
            own = items_M[start : start + BLOCK]
            states[start : start + BLOCK] = items[own] + random.standard_normal((own.size, dimension), np.float32)
        asked = items[items_M[random.integers(0, rows, queries)]]
        return cls(states, items_M, asked + random.standard_normal(asked.shape, np.float32))


def _measure(config: Config, memory: _Memory, factory: str, num_shards: int) -> dict[str, Any]:
    started = time.perf_counter()
    indexes, shards = zip(*_shards(memory, factory, num_shards), strict=True)
    seconds = time.perf_counter() - started
    search, quality = tune(shards, config.index.target_recall)
    times = [_milliseconds(ShardedIndex(LinearMap(), shards), indexes, query_D[None]) for query_D in memory.queries_UD]
    local, whole, bare = zip(*times, strict=True)
    stored = sum(len(faiss_index.to_bytes(index)) for index in indexes)
    ids = 4 + 8
    return {
        "index": factory,
        "shards": num_shards,
        "search": search,
        "recall_top_m": quality.recall_top_m,
        "recall_top_k": quality.recall_top_k,
        "build_seconds": round(seconds, 1),
        "bytes_per_row": round(stored / len(memory.rows_MD) + 2 * memory.rows_MD.shape[1] + ids, 1),
        "local_ms": round(median(local), 3),
        "global_ms": round(median(whole), 3),
        "faiss_ms": round(median(bare), 3),
        "local_over_faiss": round(median(ours / theirs for ours, theirs in zip(local, bare, strict=True)), 2),
    }


def _shards(memory: _Memory, factory: str, num_shards: int) -> Iterator[tuple[Any, IndexShard]]:
    """FAISS index and shard for each part of the memory, by item; the index is trained once and copied."""
    dimension = memory.rows_MD.shape[1]
    offset_D = np.zeros(dimension)
    empty = faiss_index.empty_index(factory, dimension)
    wanted = faiss_index.training_rows(empty)
    if wanted:
        step = max(1, len(memory.rows_MD) // wanted)
        faiss_index.train(empty, memory.rows_MD[::step].astype(np.float32))
    shard_of_M = item_shards(memory.items_M, num_shards)
    for number in range(num_shards):
        own = np.flatnonzero(shard_of_M == number) if num_shards > 1 else slice(None)
        rows_MD, row_items_M = memory.rows_MD[own], memory.items_M[own]
        index = faiss.clone_index(empty)
        items_I, places_M = np.unique(row_items_M, return_inverse=True)
        sums_ID, counts_I = np.zeros((items_I.size, dimension)), np.zeros(items_I.size, np.int64)
        for start in range(0, len(rows_MD), BLOCK):
            block = slice(start, start + BLOCK)
            index.add(rows_MD[block].astype(np.float32))
            add_rows(sums_ID, counts_I, rows_MD[block], places_M[block])
        centroids_ID = (sums_ID / counts_I[:, None]).astype(np.float32)
        shard = IndexShard(
            rows=VectorSearch(index, rows_MD, offset_D, exhaustive=factory == EXHAUSTIVE),
            row_items_M=row_items_M,
            sample_ids_M=sample_ids(np.arange(len(rows_MD)), np.full(len(rows_MD), number)),
            centroids=VectorSearch.over(centroids_ID, offset_D),
            items_I=items_I,
            counts_I=counts_I,
        )
        yield index, shard


def _sized(name: str, rows: int, dimension: int) -> str:
    """A factory string with the numbers that `faiss_index.default_factory` would give."""
    lists = faiss_index.inverted_lists(rows)
    sized = name.replace("IVF,", f"IVF{lists},").replace("IVF_", f"IVF{lists}_")
    return f"{sized}{faiss_index.code_bytes(dimension)}" if sized.endswith("PQ") else sized


def _fits(rows: int, factory: str, dimension: int) -> bool:
    compressed = "PQ" in factory
    return compressed or rows * dimension * 4 <= LARGEST_FLAT_BYTES


def _milliseconds(ours: ShardedIndex, indexes: Sequence[Any], query_1D: FloatArray) -> tuple[float, float, float]:
    """Of one query by L2D-L, by L2D-G, and by FAISS alone for the top M of every shard."""
    moments = [time.perf_counter()]
    ours.recommend(query_1D, [Query([0], K, aggregation="local", top_m=TOP_M)])
    moments.append(time.perf_counter())
    ours.recommend(query_1D, [Query([0], K)])
    moments.append(time.perf_counter())
    for index in indexes:
        index.search(query_1D, TOP_M)
    moments.append(time.perf_counter())
    local, whole, bare = 1000 * np.diff(moments)
    return local, whole, bare


def _extrapolate(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    largest = {row["factory"]: row for row in results if row["shards"] == 1}
    growth = {
        factory: 1.0 if factory == EXHAUSTIVE else 0.5 for factory in largest if factory.startswith(("Flat", "IVF"))
    }
    return [
        {
            "rows": 10**9,
            "factory": factory,
            "terabytes": round(largest[factory]["bytes_per_row"] * 1e9 / 1e12, 2),
            "local_ms": round(largest[factory]["local_ms"] * (1e9 / largest[factory]["rows"]) ** power, 1),
        }
        for factory, power in growth.items()
    ]
