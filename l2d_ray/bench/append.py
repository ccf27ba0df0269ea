"""Benchmark of a memory that grows: the seconds of appends, each until it is served, next to a rebuild of everything.

The interactions are synthetic, in time order, and items appear over time. The model is that of the configuration.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.bench.load import Load, load
from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.query import Query
from l2d_ray.data.files import join
from l2d_ray.distributed.build_index import IndexResult, build_index
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.prepare import prepare_or_append
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.serving.endpoint import endpoint
from l2d_ray.distributed.serving.promotion import promote
from l2d_ray.index.engine import engine
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import hidden_states
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.settings import for_queries
from l2d_ray.workspace import Workspace

APPENDS, SHARE = 10, 0.01
"""Appends that are compared with a rebuild, and the interactions of each as a share of the first ones."""
INTERACTIONS_OF_A_USER, INTERACTIONS_OF_AN_ITEM = 20, 10
VISIT = 5
"""Interactions in a row of one user. A visit's samples share a window, which has to run once more for each visit."""
QUERIES, TOP_M = 50, 200


@dataclass(frozen=True)
class Seconds:
    """Duration of each job, from new interactions to answers that know of them."""

    prepare: float
    extract: float
    index: float
    promote: float
    """Seconds until every replica had loaded the release. The old one answers meanwhile, and for the time of the
    longest request after that."""

    @property
    def total(self) -> float:
        """Sum of all."""
        return round(self.prepare + self.extract + self.index + self.promote, 3)


@dataclass(frozen=True)
class AppendBenchmark:
    """Appends of 1% to a memory, and what a build at once takes."""

    rebuild_seconds: float
    """Seconds of the first dataset and memory, and of an index of all rows at once. With the appended rows, the dataset
    and the memory would take a tenth more."""
    append_seconds: list[float]
    ratio: float
    """Seconds of the rebuild over those of the median append."""
    search_ratio: float
    """Seconds of a search over those with the rebuilt index, after the segments became one. Medians of both kinds."""
    segmented_search_ratio: float
    """The same before that, with the segments of the last append."""
    segments: list[int]
    """Number of segments after each append."""
    compact_seconds: float
    """Seconds of jobs/build_index.py with index.max_segments=1, after one more append."""
    rows: int
    rebuild: Seconds
    appends: list[Seconds]
    before: Load
    """Load on the endpoint while nothing else ran."""
    during: Load
    """Load on the endpoint during one more append, from its preparation to its promotion."""


def bench_append(config: Config) -> AppendBenchmark:
    """Build a memory of `bench.samples` samples, serve it, append to it and index it anew, below the workspace.

    Deletes what it wrote. The workspace may be empty.
    """
    workspaces = {name: join(config.workspace, f"bench-append-{name}") for name in ("grown", "rebuilt")}
    for uri in workspaces.values():
        Workspace.open(uri).delete("")
    grown, rebuilt = (config.replace({"workspace": uri}) for uri in workspaces.values())
    with TemporaryDirectory() as folder, Progress(APPENDS + 4, "builds") as bar:
        log = _Log(Path(folder), config.bench.samples)
        first, _ = _run(grown, log.first, promotes=False)
        bar.advance()
        with endpoint(grown) as url:
            appends, segments = [], []
            for path in log.appends[:APPENDS]:
                seconds, number = _run(grown, path)
                appends.append(seconds)
                segments.append(number)
                bar.advance()
            segmented = plan_index(for_queries(grown)).manifest
            bodies = [{"history": history, "k": 20} for history in log.histories()]
            before = load(url, "/v1/recommend", bodies, config.bench.seconds, rate=config.bench.rate)
            with ThreadPoolExecutor(1) as pool:
                seconds_of_load = round(2 * appends[-1].total) + 10
                during = pool.submit(load, url, "/v1/recommend", bodies, seconds_of_load, rate=config.bench.rate)
                _run(grown, log.appends[APPENDS])
            bar.advance()
            compacted, _ = _run(grown.replace({"index.max_segments": 1}), log.appends[APPENDS + 1])
            bar.advance()
            places = Workspace.open(grown.workspace), Workspace.open(rebuilt.workspace)
            for part in ("dataset", "memory"):
                places[0].copy(part, places[1], part)
            index, promoted = _serve(rebuilt)
            rebuild = replace(first, index=index.seconds, promote=promoted)
            bar.advance()
        paths = [plan_index(for_queries(one)).manifest for one in (grown, rebuilt)]
        at_once = ShardedIndex.open(places[1], paths[1])
        store = MemoryStore(places[1])
        states_UD = hidden_states(next(store.read(store.snapshot())))[:QUERIES]
        result = AppendBenchmark(
            rebuild_seconds=rebuild.total,
            append_seconds=[one.total for one in appends],
            ratio=round(rebuild.total / median(one.total for one in appends), 2),
            search_ratio=_search_ratio(
                states_UD, ShardedIndex.open(places[0], paths[0]), at_once, config.bench.repeats
            ),
            segmented_search_ratio=_search_ratio(
                states_UD, ShardedIndex.open(places[0], segmented), at_once, config.bench.repeats
            ),
            segments=segments,
            compact_seconds=compacted.index,
            rows=sum(shard.num_rows for shard in at_once.shards),
            rebuild=rebuild,
            appends=appends,
            before=before,
            during=during.result(),
        )
    for uri in workspaces.values():
        Workspace.open(uri).delete("")
    return result


class _Log:
    """Synthetic interactions as files: the first ones, each append, and all together."""

    def __init__(self, folder: Path, samples: int) -> None:
        """Write the files. Users and popular items come back; an item appears when its time has come."""
        random, first = np.random.default_rng(0), samples + samples // INTERACTIONS_OF_A_USER
        count = round(first * (1 + (APPENDS + 2) * SHARE))
        num_items = max(first // INTERACTIONS_OF_AN_ITEM, 10)
        self._users = random.integers(0, first // INTERACTIONS_OF_A_USER, -(-count // VISIT)).repeat(VISIT)[:count]
        self._items = (num_items * random.random(count) ** 2 * (0.9 + 0.1 * np.arange(count) / count)).astype(int)
        self._known = self._items[:first]
        ids = pa.array([f"i{item}" for item in range(num_items)])
        titles = pa.array([f"Title {item} of the year, part {item % 7}" for item in range(num_items)])
        pq.write_table(pa.table({"item_id": ids, "title": titles}), folder / "items.parquet")
        bounds = [round(first * (1 + part * SHARE)) for part in range(APPENDS + 3)]
        self.first = self._write(folder / "first", 0, first)
        self.appends = [self._write(folder / f"append-{start}", start, stop) for start, stop in pairwise(bounds)]

    def _write(self, folder: Path, start: int, stop: int) -> Path:
        part = slice(start, stop)
        users = pa.array([f"u{user}" for user in self._users[part]])
        items = pa.array([f"i{item}" for item in self._items[part]])
        table = pa.table({"user_id": users, "item_id": items, "timestamp": np.arange(start, stop)})
        pq.write_table(table, folder.with_suffix(".parquet"))
        return folder.with_suffix(".parquet")

    def histories(self) -> list[list[str]]:
        """Return histories of items that the first interactions have."""
        random = np.random.default_rng(1)
        return [[f"i{item}" for item in random.choice(self._known, 10)] for _ in range(500)]


def _run(config: Config, log: Path, promotes: bool = True) -> tuple[Seconds, int]:
    """Run the jobs from new interactions on, and return their durations and the number of segments of the index."""
    appends = Workspace.open(config.workspace).exists("dataset")
    data = {
        "source": "table",
        "interactions": str(log),
        "items": str(log.with_name("items.parquet")),
        "split": "none",
        "min_interactions": 1,
        "append": appends,
    }
    moments = [time.perf_counter()]
    prepare_or_append(config.replace({f"data.{name}": value for name, value in data.items()}))
    moments.append(time.perf_counter())
    build_memory(config)
    moments.append(time.perf_counter())
    prepared, extracted = np.diff(moments).round(3).tolist()
    index, promoted = _serve(config, promotes)
    return Seconds(prepared, extracted, index.seconds, promoted), index.segments


def _serve(config: Config, promotes: bool = True) -> tuple[IndexResult, float]:
    """Build the index and promote it; return it and the seconds that the promotion took."""
    index = build_index(config)
    return index, promote(config).load_seconds if promotes else 0.0


def _search_ratio(states_UD: FloatArray, ours: ShardedIndex, other: ShardedIndex, repeats: int) -> float:
    """Return the seconds of searches in one index over those in another, by L2D-G and L2D-L; median of the pairs."""
    engine.set_threads(1)
    ratios = []
    for aggregation in ("global", "local"):
        for state_D in states_UD.repeat(repeats, axis=0):
            query, pair = [Query([0], aggregation=aggregation, top_m=TOP_M)], []
            for index in (ours, other):
                started = time.perf_counter()
                index.recommend(state_D[None], query)
                pair.append(time.perf_counter() - started)
            ratios.append(pair[0] / pair[1])
    return round(median(ratios), 3)
