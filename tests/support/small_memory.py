"""A memory of random states, written as jobs/build_memory.py writes it, and its index, without Ray or a model."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config, IndexConfig
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.core.samples import sample_ids
from l2d_ray.index.engine import engine
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.index.tuning import tune
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import MemoryIdentity
from l2d_ray.schema import SAMPLES
from l2d_ray.stages.index_growth import kept_setting
from l2d_ray.stages.index_plan import IndexPlan, plan_index
from l2d_ray.stages.index_sums import sum_moments
from l2d_ray.stages.indexing import build_shard, finish, fit, open_shard
from l2d_ray.workspace import Workspace

DIMENSION = 8
engine.set_threads(1)  # a second thread only slows such small searches down


def identity(num_shards: int, dimension: int = DIMENSION) -> MemoryIdentity:
    return MemoryIdentity(
        base_model="b" * 64,
        num_layers=2,
        adapter=None,
        tokenizer="t" * 64,
        template="p" * 64,
        dtype="float32",
        max_items=10,
        stride=10,
        dimension=dimension,
        num_shards=num_shards,
    )


def rows(count: int, items: int, seed: int = 0, dimension: int = DIMENSION) -> tuple[NDArray[np.float16], pa.Table]:
    """Return states around one place per item, with a large variance along the first axis. Some rows repeat."""
    random = np.random.default_rng(seed)
    item_of = random.integers(0, items, count).astype(np.int32)
    places = random.standard_normal((items, dimension))
    states = places[item_of] + 0.5 * random.standard_normal((count, dimension)) + 5
    states[:, 0] *= 20
    states[count // 2 :][::3] = states[: len(states[count // 2 :][::3])]
    ids = sample_ids(np.arange(count), np.ones(count, np.int64))
    columns = [ids, np.arange(count), item_of, np.arange(count)]
    return states.astype(np.float16), pa.table(
        [pa.array(c, t) for c, t in zip(columns, SAMPLES.types, strict=True)], schema=SAMPLES
    )


def write_memory(folder: Path, count: int = 600, items: int = 40, num_shards: int = 3, units: int = 3) -> Workspace:
    """Write one snapshot of these rows to a workspace."""
    workspace = Workspace.open(str(folder))
    store, (states, samples) = MemoryStore(workspace), rows(count, items)
    for unit in range(units):
        part = slice(unit * count // units, (unit + 1) * count // units)
        with store.write_unit(f"u{unit}", identity(num_shards)) as writer:
            writer.write(samples.slice(part.start, part.stop - part.start), states[part])
    store.take_snapshot([f"u{unit}" for unit in range(units)], "d" * 64, 1.0)
    return workspace


def plan(workspace: Workspace, **index: Any) -> IndexPlan:
    return plan_index(Config(workspace=workspace.uri, index=IndexConfig(**index)))


def build(workspace: Workspace, **index: Any) -> tuple[IndexPlan, IndexManifest]:
    """Build an index step by step."""
    made = plan(workspace, **index)
    for shard in range(made.num_shards):
        sum_moments(made, shard)
    fitted = fit(made)
    shards = [build_shard(made, fitted, shard) for shard in range(made.num_shards)]
    tuned = kept_setting(made, fitted) or tune(
        [open_shard(made, fitted, shard) for shard in shards], made.config.target_recall
    )
    return made, finish(made, fitted, shards, tuned, time.time())


def indexed(folder: Path, num_shards: int = 3, prior: float = 0.0, **index: Any) -> ShardedIndex:
    """Return the index of a memory of 600 rows of 40 items, ready to search."""
    workspace = write_memory(folder, num_shards=num_shards)
    return ShardedIndex.open(workspace, build(workspace, **index)[0].manifest).with_prior(prior)


def states_near_rows(count: int = 12) -> NDArray[np.float16]:
    """Return `count` states near rows of that memory, followed by as many rows themselves."""
    states, _ = rows(600, 40)
    random = np.random.default_rng(9)
    near = states[:count] + random.standard_normal((count, DIMENSION)).astype(np.float16) / 4
    return np.concatenate([near, states[300 : 300 + count]])


def by_global(index: ShardedIndex, states: NDArray, k: int, **options: Any) -> list[ScoredItems]:
    """Recommend by L2D-G after every state, with the same options."""
    return index.recommend(states, [Query([0], k, **options)] * len(states))


def by_local(index: ShardedIndex, states: NDArray, k: int, top_m: int, **options: Any) -> list[ScoredItems]:
    """Recommend by L2D-L after every state, with the same options."""
    return index.recommend(states, [Query([0], k, aggregation="local", top_m=top_m, **options)] * len(states))


def assert_same_lists(lists: Sequence[ScoredItems], others: Sequence[ScoredItems]) -> None:
    """Assert that items and scores are the same to the last bit."""
    assert len(lists) == len(others) > 0
    for one, other in zip(lists, others, strict=True):
        np.testing.assert_array_equal(one.items_I, other.items_I)
        np.testing.assert_array_equal(one.scores_I, other.scores_I)
