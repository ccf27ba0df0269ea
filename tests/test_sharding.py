"""The search over all shards against the definitions on the whole memory, and the opening of an index."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.l2d_definitions import l2d_global, l2d_local
from support.small_memory import (
    assert_same_lists,
    build,
    by_global,
    by_local,
    indexed,
    rows,
    states_near_rows,
    write_memory,
)

from l2d_ray.core.decoding import completed
from l2d_ray.core.moments import item_sums
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.index import faiss_engine
from l2d_ray.index.manifest import IndexFile, IndexManifest, ShardRecord
from l2d_ray.index.sharding import IndexReader, ShardedIndex
from l2d_ray.index.vector_search import VectorSearch
from l2d_ray.workspace import Workspace

NONE = np.empty(0, np.int64)


@pytest.mark.parametrize("space", ["none", "whiten-within"])
def test_one_two_and_seven_shards_recommend_the_same(tmp_path: Path, space: str) -> None:
    states = states_near_rows()
    results = []
    for num_shards in (1, 2, 7):
        index = indexed(tmp_path / str(num_shards), num_shards=num_shards, space=space)
        results.append((by_global(index, states, 20), by_local(index, states, 20, 50)))
    for other in results[1:]:
        # The map is fitted to the sums of the shards, added in another order. Scores differ by rounding, items do not.
        for lists, other_lists in zip(results[0], other, strict=True):
            for one, two in zip(lists, other_lists, strict=True):
                assert one.items_I.tolist() == two.items_I.tolist()
                np.testing.assert_allclose(one.scores_I, two.scores_I, rtol=2e-3 if space != "none" else 0)


def test_l2d_equals_its_definition_on_the_float16_rows(tmp_path: Path) -> None:
    """Includes ties: a third of the second half of the rows repeat earlier rows."""
    index, states = indexed(tmp_path, space="none"), states_near_rows()
    memory, samples = rows(600, 40)
    ids, items = samples["sample_id"].to_numpy(), samples["item_index"].to_numpy()
    sums, counts = item_sums(memory, items, 40)
    means = (sums / counts[:, None]).astype(np.float32)
    whole = [l2d_global(state, means, np.arange(40), 15) for state in states]
    assert_same_lists(by_global(index, states, 15), whole)
    for top_m in (1, 30, 599, 600, 5000):
        local = [l2d_local(state, memory, ids, items, top_m, 40) for state in states]
        filling = [l2d_global(state, means, np.arange(40), 40) for state in states]
        expected = [completed(found, more, 15, NONE, None) for found, more in zip(local, filling, strict=True)]
        assert_same_lists(by_local(index, states, 15, top_m), expected)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,PQ4x4"])
def test_one_search_answers_for_several_m(tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, states = indexed(tmp_path, factory=factory), states_near_rows()
    of_rows, searches = [id(shard.segments[0].rows) for shard in index.shards], []
    search = VectorSearch.search
    monkeypatch.setattr(VectorSearch, "search", lambda *args: searches.append((id(args[0]), args[2])) or search(*args))
    top_ms = (50, 200, 20)
    results = index.recommend_at(states, [Query([0], 5, top_m=9)] * len(states), top_ms)
    assert [count for searched, count in searches if searched in of_rows] == [200] * len(index.shards)
    assert len(results) == len(top_ms)
    for top_m, lists in zip(top_ms, results, strict=True):
        if factory == "Flat" or top_m == 200:  # for a smaller M, an approximate index may find more than it would alone
            assert_same_lists(lists, by_local(index, states, 5, top_m))


def test_filters_remove_items_and_change_no_score(tmp_path: Path) -> None:
    index, states = indexed(tmp_path), states_near_rows(4)
    for options in ({"aggregation": "global"}, {"aggregation": "local", "top_m": 40}):
        everything = index.recommend(states, [Query([0], 40, **options)] * len(states))
        excluded = [np.sort(whole.items_I[:3]) for whole in everything]
        filtered = index.recommend(states, [Query([0], 40, exclude, **options) for exclude in excluded])
        allow = np.array([3, 5, 8, 13, 999])
        within = index.recommend(states, [Query([0], 40, allow=allow, **options)] * len(states))
        for whole, exclude, rest, only in zip(everything, excluded, filtered, within, strict=True):
            assert_same_lists([rest], [whole.permitted(exclude)])
            assert_same_lists([only], [whole.permitted(NONE, allow)])
            assert set(only.items_I.tolist()) == {3, 5, 8, 13}


def test_the_prior_adds_log_frequency_to_half_the_squared_distance(tmp_path: Path) -> None:
    weight = 0.7
    index = indexed(tmp_path, prior=weight, space="none")
    state = states_near_rows(1)[0]
    memory, samples = rows(600, 40)
    sums, counts = item_sums(memory, samples["item_index"].to_numpy(), 40)
    distances = np.square(sums / counts[:, None] - state.astype(float)).sum(axis=1)
    expected = np.argsort(0.5 * distances - weight * np.log(counts), kind="stable")
    (found,) = by_global(index, state[None], 40)
    assert found.items_I.tolist() == expected.tolist()


def damaged(folder: Path, name: str) -> tuple[Path, str]:
    """Return a file of shard 1 to damage, and the manifest."""
    made, manifest = build(write_memory(folder))
    return folder / file_of(manifest.shards[1], name).path, made.manifest


def file_of(shard: ShardRecord, name: str) -> IndexFile:
    return (shard.files | shard.segments[0].files)[name]


def opened(folder: Path) -> Workspace:
    return Workspace.open(str(folder))


@pytest.mark.parametrize("name", ["rows", "faiss", "sample_ids", "centroids"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "shape"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path, manifest = damaged(tmp_path, name)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "garbage":
        path.write_bytes(bytes(len(content)))
    else:  # a file of another shard, of the recorded size
        other = file_of(IndexManifest.read(opened(tmp_path), manifest).shards[0], name)
        path.write_bytes((tmp_path / other.path).read_bytes())
        record = tmp_path / manifest
        record.write_text(record.read_text().replace(f'"bytes": {len(content)}', f'"bytes": {other.bytes}'))
    with pytest.raises(InputError, match=re.escape(str(path))):
        ShardedIndex.open(opened(tmp_path), manifest)


def test_a_changed_file_of_the_right_size_is_refused_where_checksums_are_verified(tmp_path: Path) -> None:
    path, manifest = damaged(tmp_path, "rows")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader = IndexReader.open(opened(tmp_path), manifest)
    reader.shard(0, verify=True)
    reader.shard(1)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: its checksum is not the recorded one"):
        reader.shard(1, verify=True)


def test_a_file_of_a_newer_faiss_is_refused_with_its_version(tmp_path: Path) -> None:
    path, manifest = damaged(tmp_path, "faiss")
    content = bytearray(path.read_bytes())
    content[:4] = b"IxZZ"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"FAISS .* cannot read it .* written by FAISS {faiss_engine.VERSION};"):
        ShardedIndex.open(opened(tmp_path), manifest)


def test_an_index_of_another_snapshot_is_refused(tmp_path: Path) -> None:
    workspace, other = write_memory(tmp_path / "one"), write_memory(tmp_path / "other", count=500)
    made, elsewhere = build(workspace)[0], build(other)[0]
    shutil.copy(tmp_path / "other" / elsewhere.manifest, tmp_path / "one" / made.manifest)
    message = r"index-0.995.json: belongs to snapshot 1 with digest \w{8}, but is in the folder 1-\w{8};"
    with pytest.raises(InputError, match=message):
        ShardedIndex.open(workspace, made.manifest)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    (tmp_path / made.manifest).unlink()
    manifest.model_copy(update={"shards": manifest.shards[:2]}).write(workspace, made.manifest)
    with pytest.raises(InputError, match=r"index-0.995.json: lists shards \[0, 1\], expected 3;"):
        ShardedIndex.open(workspace, made.manifest)


def test_a_map_of_another_dimension_is_refused(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    (tmp_path / made.manifest).unlink()
    wider = manifest.identity.model_copy(update={"dimension": 16})
    manifest.model_copy(update={"identity": wider}).write(workspace, made.manifest)
    with pytest.raises(InputError, match=re.escape(f"{manifest.fitted.map.path}: has dimension 8, expected 16;")):
        ShardedIndex.open(workspace, made.manifest)
