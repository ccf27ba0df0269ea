"""Indexes of a memory that grows: segments, sums and maps of older indexes, and what is removed with them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.small_memory import (
    DIMENSION,
    assert_same_lists,
    build,
    by_global,
    by_local,
    identity,
    plan,
    rows,
    states_near_rows,
)

from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.moments import ShardMoments
from l2d_ray.index.shard import open_segments
from l2d_ray.index.sharding import IndexReader, ShardedIndex
from l2d_ray.memory.deletions import write_deletions
from l2d_ray.memory.store import MemoryStore
from l2d_ray.stages.index_sums import sum_moments
from l2d_ray.workspace import Workspace

COUNT, ITEMS, SHARDS = 600, 40, 3
CUTS = (0, 400, 420, 440, 460, COUNT)
TIMES = np.arange(COUNT) * 8640  # ten rows a day


def write_unit(store: MemoryStore, unit: int) -> None:
    """Commit the rows between two cuts."""
    (states, samples), part = rows(COUNT, ITEMS), slice(CUTS[unit], CUTS[unit + 1])
    samples = samples.set_column(3, "timestamp", pa.array(TIMES))
    with store.write_unit(f"u{unit}", identity(SHARDS)) as writer:
        writer.write(samples.slice(part.start, part.stop - part.start), states[part])


def grow(workspace: Workspace, units: Sequence[int], dataset: str = "d") -> None:
    """Take a snapshot of these units; write those that are new."""
    store = MemoryStore(workspace)
    for unit in units:
        if not store.committed(f"u{unit}"):
            write_unit(store, unit)
    store.take_snapshot([f"u{unit}" for unit in units], dataset * 64, 1.0)


def erase(workspace: Workspace, unit: int, places: list[int]) -> None:
    """Take a snapshot without some rows of one unit's first shard that has rows."""
    store = MemoryStore(workspace)
    newest, record = store.snapshot(), store.units()[f"u{unit}"]
    vector = write_deletions(workspace, record.unit, {record.files[0].shard: np.array(places)})
    changes = {
        "number": newest.number + 1,
        "deletions": newest.deletions | {record.unit: vector},
        "rows": newest.rows - len(places),
    }
    store.add_snapshot(newest.model_copy(update=changes))


def built(workspace: Workspace, **index: object) -> IndexManifest:
    return build(workspace, **({"max_drift": 9.0} | index))[1]


def opened(workspace: Workspace, **index: object) -> ShardedIndex:
    return ShardedIndex.open(workspace, plan(workspace, **index).manifest)


def assert_recommend_the_same(one: ShardedIndex, other: ShardedIndex) -> None:
    states = states_near_rows()
    assert_same_lists(by_global(one, states, 20), by_global(other, states, 20))
    for top_m in (1, 30, 250, COUNT):
        assert_same_lists(by_local(one, states, 20, top_m), by_local(other, states, 20, top_m))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Return a memory of one unit, and its index."""
    workspace = Workspace.open(str(tmp_path / "grown"))
    grow(workspace, [0])
    built(workspace)
    return workspace


def test_an_index_that_grew_recommends_the_same_as_one_built_at_once_with_its_map(workspace: Workspace) -> None:
    first = IndexManifest.read(workspace, plan(workspace).manifest)
    for newest in (1, 2, 3):
        grow(workspace, range(newest + 1))
        manifest = built(workspace)
        assert manifest.fitted.map == first.fitted.map
        at_once = Workspace.open(f"{workspace.uri}-{newest}")
        shutil.copytree(workspace.uri, at_once.uri)
        shutil.rmtree(f"{at_once.uri}/{plan(workspace).base}")
        assert built(at_once, max_segments=1).fitted.segments == [[f"u{unit}" for unit in range(newest + 1)]]
        assert_recommend_the_same(opened(workspace), opened(at_once))
        assert manifest.rows == CUTS[newest + 1]


def test_segments_double_and_only_new_rows_are_written(workspace: Workspace) -> None:
    segments = []
    for newest in (1, 2, 3):
        grow(workspace, range(newest + 1))
        before = set(workspace.files("index"))
        segments.append(built(workspace).fitted.segments)
        written = [path for path in set(workspace.files("index")) - before if path.endswith("rows.npy")]
        assert sum(np.load(workspace.path(path)).shape[0] for path in written) == [20, 40, 20][newest - 1]
    assert segments == [[["u0"], ["u1"]], [["u0"], ["u1", "u2"]], [["u0"], ["u1", "u2"], ["u3"]]]


def test_segments_that_reach_the_base_or_their_limit_become_one(workspace: Workspace) -> None:
    grow(workspace, [0, 1, 2, 3, 4])  # 200 rows are half of the base
    assert built(workspace).fitted.segments == [["u0"], ["u1", "u2", "u3", "u4"]]
    shutil.rmtree(f"{workspace.uri}/{plan(workspace).base}")
    manifest = built(workspace, max_segments=1)
    assert (manifest.fitted.segments, manifest.fitted.kept) == ([["u0", "u1", "u2", "u3", "u4"]], 0)
    assert manifest.fitted.older is not None


def test_a_memory_that_moved_gets_a_new_map(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    first = IndexManifest.read(workspace, plan(workspace).manifest)
    grow(workspace, [0, 1])
    manifest = built(workspace, max_drift=0.0)
    assert (manifest.fitted.older, len(manifest.fitted.segments)) == (None, 1)
    assert manifest.fitted.map != first.fitted.map
    assert "the memory moved by 0.0" in caplog.text
    assert "more than index.max_drift=0.0; fitting its map again" in caplog.text


def test_an_approximate_index_keeps_its_setting_and_searches_new_rows_exactly(workspace: Workspace) -> None:
    factory = "IVF16,PQ4x4"
    first = built(workspace, factory=factory)
    grow(workspace, [0, 1])
    manifest = built(workspace, factory=factory)
    assert (manifest.search, manifest.quality) == (first.search, first.quality)
    base, later = opened(workspace, factory=factory).shards[0].segments
    assert (base.rows.candidates.exhaustive, later.rows.candidates.exhaustive) == (False, True)
    # Another target recall has no older index. It keeps the segments of this one and tunes their search.
    higher = built(workspace, factory=factory, target_recall=0.999)
    assert higher.shards == manifest.shards
    assert higher.quality.recall_top_k >= 0.999


def test_sums_that_grew_or_shrank_are_those_of_the_rows(workspace: Workspace) -> None:
    for unit in (1, 2, 3):
        grow(workspace, range(unit + 1))
    for shard in range(SHARDS):
        sum_moments(plan(workspace, snapshot=2), shard)
    erase(workspace, 1, [0, 2])
    grown = plan(workspace)
    alone = Workspace.open(f"{workspace.uri}-alone")
    shutil.copytree(workspace.uri, alone.uri)
    alone.delete("index")
    for shard in range(SHARDS):
        sum_moments(grown, shard)
        sum_moments(plan(alone), shard)
        one, other = (ShardMoments.read(place, grown.moments(shard)) for place in (workspace, alone))
        np.testing.assert_array_equal(one.items_I, other.items_I)
        np.testing.assert_array_equal(one.counts_I, other.counts_I)
        np.testing.assert_array_equal(one.sums_ID, other.sums_ID)  # sums of float16 are exact in float64
        assert (one.moments.rows, one.moments.items) == (other.moments.rows, other.moments.items)
        np.testing.assert_allclose(one.moments.outer_DD, other.moments.outer_DD, rtol=1e-12)
        np.testing.assert_allclose(one.moments.item_outer_DD, other.moments.item_outer_DD, rtol=1e-12)


def test_segments_with_erased_rows_are_built_again(workspace: Workspace) -> None:
    for unit in (1, 2, 3):
        grow(workspace, range(unit + 1))
        built(workspace)
    erase(workspace, 1, [0])
    manifest = built(workspace)
    assert [len(segment) for segment in manifest.fitted.segments] == [1, 3]
    assert manifest.fitted.segments[0] == ["u0"]
    erase(workspace, 0, [5])
    manifest = built(workspace)
    assert (len(manifest.fitted.segments), manifest.fitted.kept, manifest.rows) == (1, 0, 458)
    assert manifest.fitted.older is not None
    fresh = Workspace.open(f"{workspace.uri}-fresh")
    shutil.copytree(workspace.uri, fresh.uri)
    shutil.rmtree(f"{fresh.uri}/{plan(workspace).base}")
    built(fresh, max_segments=1)
    assert_recommend_the_same(opened(workspace), opened(fresh))


def test_another_memory_takes_nothing_from_an_older_index(workspace: Workspace) -> None:
    grow(workspace, [1, 2], dataset="e")
    manifest = built(workspace)
    assert (manifest.fitted.older, manifest.fitted.segments) == (None, [["u1", "u2"]])


def test_a_damaged_older_index_is_left_out(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    Path(workspace.path(plan(workspace).manifest)).write_text("{")
    grow(workspace, [0, 1])
    assert built(workspace).fitted.older is None
    assert "Building the index anew" in caplog.text


def test_a_shard_opens_only_the_segments_that_are_not_open(workspace: Workspace) -> None:
    first = plan(workspace).manifest
    grow(workspace, [0, 1])
    built(workspace)
    opened = open_segments()
    old = IndexReader.open(workspace, first).shard(0, verify=True, opened=opened)
    new = IndexReader.open(workspace, plan(workspace).manifest).shard(0, verify=True, opened=opened)
    assert new.segments[0] is old.segments[0]
    assert [segment.rows.vectors_ND.shape[1] for segment in new.segments] == [DIMENSION, DIMENSION]
    del old
    assert len(opened) == 2
    del new
    assert len(opened) == 0


def test_sums_with_a_half_life_are_those_of_the_definition(workspace: Workspace) -> None:
    half = built(workspace, half_life_days=5.0)
    (states, samples), newest = rows(COUNT, ITEMS), CUTS[1] - 1
    weights = 0.5 ** ((newest // 10 - np.arange(COUNT) // 10) / 5)
    for shard in range(SHARDS):
        sums = plan(workspace, half_life_days=5.0).item_sums(shard)
        for item, weight, total in zip(sums.items_I, sums.counts_I, sums.sums_ID, strict=True):
            of_item = np.flatnonzero(samples["item_index"].to_numpy()[: newest + 1] == item)
            assert weight == pytest.approx(weights[of_item].sum())
            np.testing.assert_allclose(total, weights[of_item] @ states[of_item].astype(np.float64), atol=1e-6)
    assert half.fitted.segments == [["u0"]]
    other = opened(workspace)
    mine = opened(workspace, half_life_days=5.0)
    assert not np.allclose(mine.shards[0].counts_I, other.shards[0].counts_I)
    assert_same_lists(by_local(mine, states_near_rows(), 5, COUNT), by_local(other, states_near_rows(), 5, COUNT))


def test_an_infinite_half_life_changes_nothing(workspace: Workspace) -> None:
    infinite = {"half_life_days": float("inf")}
    built(workspace, **infinite)
    assert_recommend_the_same(opened(workspace), opened(workspace, **infinite))
    states, prior = states_near_rows(), 2.0
    one, other = (opened(workspace, **settings).with_prior(prior) for settings in ({}, infinite))
    assert_same_lists(by_global(one, states, 20), by_global(other, states, 20))


def test_an_index_with_a_half_life_grows_to_the_one_built_at_once(workspace: Workspace) -> None:
    settings = {"half_life_days": 5.0}
    built(workspace, **settings)
    for newest in (1, 2):
        grow(workspace, range(newest + 1))
        assert built(workspace, **settings).fitted.kept == 1
    at_once = Workspace.open(f"{workspace.uri}-at-once")
    shutil.copytree(workspace.uri, at_once.uri)
    shutil.rmtree(f"{at_once.uri}/{plan(workspace).base}")
    for sums in Path(at_once.uri).glob("index/*/moments/*/half-life-*"):
        shutil.rmtree(sums)
    built(at_once, **settings)
    for one, other in zip(opened(workspace, **settings).shards, opened(at_once, **settings).shards, strict=True):
        np.testing.assert_array_equal(one.items_I, other.items_I)
        np.testing.assert_allclose(one.counts_I, other.counts_I, rtol=1e-12)
        np.testing.assert_allclose(one.centroids.vectors_ND, other.centroids.vectors_ND, rtol=1e-5)
    grow(workspace, [0, 1])  # the newest unit is gone
    built(workspace, **settings)
    assert plan(workspace, **settings).newest_day == (CUTS[2] - 1) // 10
