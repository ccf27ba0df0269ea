"""Indexes of a memory, built by every step but without Ray, against the definitions of core/ on the whole memory."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from support.l2d_definitions import l2d_global, l2d_local
from support.small_memory import DIMENSION, build, identity, indexed, plan, rows, write_memory

from l2d_ray.core.aggregation import item_sums
from l2d_ray.core.decoding import ScoredItems, completed
from l2d_ray.core.query import Query
from l2d_ray.core.space import LinearMap
from l2d_ray.errors import InputError
from l2d_ray.index import faiss_index
from l2d_ray.index.faiss_index import VectorSearch, default_factory
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.shard import IndexShard
from l2d_ray.index.sharding import IndexReader, ShardedIndex
from l2d_ray.index.tuning import tune
from l2d_ray.memory.store import MemoryStore
from l2d_ray.stages.indexing import build_shard, fit, sum_moments
from l2d_ray.workspace import Workspace

NONE = np.empty(0, np.int64)


def queries(count: int = 12) -> NDArray[np.float16]:
    """Some near the rows, some rows themselves."""
    states, _ = rows(600, 40)
    random = np.random.default_rng(9)
    near = states[:count] + random.standard_normal((count, DIMENSION)).astype(np.float16) / 4
    return np.concatenate([near, states[300 : 300 + count]])


def wishes(count: int, k: int, **options: Any) -> list[Query]:
    """Queries that differ in nothing."""
    return [Query([0], k, **options)] * count


def by_global(index: ShardedIndex, states: NDArray, k: int, **options: Any) -> list[ScoredItems]:
    return index.recommend(states, wishes(len(states), k, **options))


def by_local(index: ShardedIndex, states: NDArray, k: int, top_m: int, **options: Any) -> list[ScoredItems]:
    return index.recommend(states, wishes(len(states), k, aggregation="local", top_m=top_m, **options))


def assert_equal(lists: Sequence[ScoredItems], others: Sequence[ScoredItems]) -> None:
    assert len(lists) == len(others) > 0
    for one, other in zip(lists, others, strict=True):
        np.testing.assert_array_equal(one.items_I, other.items_I)
        np.testing.assert_array_equal(one.scores_I, other.scores_I)


@pytest.mark.parametrize("space", ["none", "whiten-within"])
def test_one_two_and_seven_shards_recommend_the_same_to_the_last_bit(tmp_path: Path, space: str) -> None:
    asked = queries()
    results = []
    for num_shards in (1, 2, 7):
        index = indexed(tmp_path / str(num_shards), num_shards=num_shards, space=space)
        results.append(
            (
                by_global(index, asked, 20),
                by_local(index, asked, 20, 50),
            )
        )
    for other in results[1:]:
        # The map is fitted on sums of shards, in another order: equal but for rounding. Lists must be the same.
        for ours, theirs in zip(results[0], other, strict=True):
            for one, two in zip(ours, theirs, strict=True):
                assert one.items_I.tolist() == two.items_I.tolist()
                np.testing.assert_allclose(one.scores_I, two.scores_I, rtol=2e-3 if space != "none" else 0)


def test_plain_l2d_is_its_definition_on_the_float16_rows(tmp_path: Path) -> None:
    """Ties included: a third of the second half of the rows repeat earlier ones."""
    index, asked = indexed(tmp_path, space="none"), queries()
    states, samples = rows(600, 40)
    ids, items = samples["sample_id"].to_numpy(), samples["item_index"].to_numpy()
    sums, counts = item_sums(states, items, 40)
    centroids = (sums / counts[:, None]).astype(np.float32)
    whole = [l2d_global(query, centroids, np.arange(40), 15) for query in asked]
    assert_equal(by_global(index, asked, 15), whole)
    for top_m in (1, 30, 599, 600, 5000):
        expected = [
            completed(
                l2d_local(query, states, ids, items, top_m, 40),
                l2d_global(query, centroids, np.arange(40), 40),
                15,
                NONE,
                None,
            )
            for query in asked
        ]
        assert_equal(by_local(index, asked, 15, top_m), expected)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,PQ4x4"])
def test_one_search_answers_for_several_m(tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, asked = indexed(tmp_path, factory=factory), queries()
    rows_searches, searched = [id(shard.rows) for shard in index.shards], []
    search = VectorSearch.search
    monkeypatch.setattr(VectorSearch, "search", lambda *args: searched.append((id(args[0]), args[2])) or search(*args))
    top_ms = (50, 200, 20)
    results = index.recommend_at(asked, wishes(len(asked), 5, aggregation="local", top_m=9), top_ms)
    assert [count for search, count in searched if search in rows_searches] == [200] * len(index.shards)
    assert len(results) == len(top_ms)
    for top_m, lists in zip(top_ms, results, strict=True):
        if factory == "Flat" or top_m == 200:
            assert_equal(lists, by_local(index, asked, 5, top_m))


def test_filters_take_items_out_and_change_no_score(tmp_path: Path) -> None:
    index, asked = indexed(tmp_path), queries(4)
    for options in ({"aggregation": "global"}, {"aggregation": "local", "top_m": 40}):
        everything = index.recommend(asked, wishes(len(asked), 40, **options))
        out = [np.sort(scored.items_I[:3]) for scored in everything]
        cuts = index.recommend(asked, [Query([0], 40, exclude, **options) for exclude in out])
        for whole, cut, gone in zip(everything, cuts, out, strict=True):
            assert cut.items_I.tolist() == [item for item in whole.items_I.tolist() if item not in gone]
        allow = np.array([3, 5, 8, 13, 999])
        within = index.recommend(asked, wishes(len(asked), 40, allow=allow, **options))
        for whole, only in zip(everything, within, strict=True):
            assert only.items_I.tolist() == [item for item in whole.items_I.tolist() if item in allow]
            assert set(only.items_I.tolist()) == {3, 5, 8, 13}


def test_the_prior_is_log_frequency_added_to_half_the_squared_distance(tmp_path: Path) -> None:
    weight = 0.7
    index = indexed(tmp_path, prior=weight, space="none")
    (query,) = queries(1)[:1]
    states, samples = rows(600, 40)
    sums, counts = item_sums(states, samples["item_index"].to_numpy(), 40)
    distances = np.square(sums / counts[:, None] - query.astype(float)).sum(axis=1)
    expected = np.argsort(0.5 * distances - weight * np.log(counts), kind="stable")
    (found,) = by_global(index, query[None], 40)
    assert found.items_I.tolist() == expected.tolist()


def test_a_share_of_the_memory_is_what_a_smaller_memory_would_be(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace, sample_fraction=0.5)
    smaller, _ = build(workspace, sample_fraction=0.3)
    ids = [
        {int(i) for shard in ShardedIndex.open(workspace, one.manifest).shards for i in shard.sample_ids_M}
        for one in (smaller, made)
    ]
    assert ids[0] < ids[1]
    assert len(ids[1]) == manifest.rows
    assert 0.4 < manifest.rows / 600 < 0.6


@pytest.mark.parametrize(
    "factory", ["Flat", "SQfp16", "HNSW16", "IVF4,Flat", "IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4,RFlat", "PQ4x4"]
)
def test_any_factory_string_gives_exact_scores_and_measures_itself(tmp_path: Path, factory: str) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace, factory=factory)
    assert manifest.quality.queries >= 200
    assert manifest.quality.recall_top_k >= 0.995
    if factory == "Flat":
        assert (manifest.quality.recall_top_m, manifest.quality.recall_top_k) == (1, 1)
    if "IVF" in factory:
        assert manifest.search.startswith("nprobe=")
    index, asked = ShardedIndex.open(workspace, made.manifest), queries()
    exact = ShardedIndex.open(workspace, build(workspace)[0].manifest)
    top = by_local(index, asked, 40, 600)
    # With M beyond the memory every candidate found is averaged, so that what was found has its exact score.
    agree = [one.items_I[0] == two.items_I[0] for one, two in zip(top, by_local(exact, asked, 40, 600), strict=True)]
    assert np.mean(agree) > 0.9


def test_a_lossy_index_returns_the_distances_of_the_rows_themselves(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path, num_shards=1)
    shard = ShardedIndex.open(workspace, build(workspace, factory="PQ4x4", space="none")[0].manifest).shards[0]
    states, samples = rows(600, 40)
    of_id = dict(zip(samples["sample_id"].to_pylist(), states.astype(float), strict=True))
    query = queries(1)[0]
    (found,) = shard.nearest_rows(query[None], 20)
    expected = [np.square(of_id[i] - query).sum() for i in found.sample_ids_M.tolist()]
    np.testing.assert_allclose(found.distances_M, expected)
    assert (np.diff(found.distances_M) >= 0).all()


def test_ties_beyond_the_margin_are_all_seen() -> None:
    """1,000 identical vectors: which of them are the M nearest is for the sample ids to say, not for FAISS."""
    vectors = np.ones((1000, 3), np.float16)
    ((numbers, distances),) = VectorSearch.over(vectors, np.zeros(3)).search(np.zeros((1, 3)), 5)
    assert numbers.tolist() == list(range(1000))
    assert set(distances.tolist()) == {3.0}


def shard_of(factory: str, vectors: NDArray[np.float16], items: NDArray, ids: NDArray) -> IndexShard:
    """All rows in one shard, indexed as they are."""
    index, zero = faiss_index.empty_index(factory, vectors.shape[1]), np.zeros(vectors.shape[1])
    faiss_index.train(index, vectors.astype(np.float32))
    index.add(vectors.astype(np.float32))
    means = np.stack([vectors[items == item].mean(axis=0) for item in range(items.max() + 1)]).astype(np.float32)
    search = VectorSearch(index, vectors, zero, exhaustive=factory == "Flat")
    numbers = np.arange(len(means), dtype=np.int32)
    return IndexShard(search, items.astype(np.int32), ids, VectorSearch.over(means, zero), numbers, np.bincount(items))


@pytest.mark.parametrize("factory", ["HNSW16", "IVF64,PQ4"])
def test_what_a_search_is_tuned_to_holds_at_any_m(factory: str) -> None:
    """On histories that it was not tuned on. Tuned at 200 alone, HNSW16 gives 0.91 of the exact top K at 1,000; tuned
    at 1,000 alone, the codes give 0.98 at 200."""
    random = np.random.default_rng(0)
    means, items = random.standard_normal((300, 16)), random.integers(0, 300, 6000)
    vectors = (means[items] + random.standard_normal((6000, 16))).astype(np.float16)
    asked = (means[random.integers(0, 300, 200)] + random.standard_normal((200, 16))).astype(np.float16)
    shard, exact = (shard_of(name, vectors, items, np.arange(6000)) for name in (factory, "Flat"))
    quality = tune([shard], target=0.99)[1]
    assert quality.recall_top_k >= 0.99
    for top_m in (20, 200, 1000):
        both = [by_local(ShardedIndex(LinearMap(), [one]), asked, 20, top_m) for one in (shard, exact)]
        agree = [np.isin(own.items_I, best.items_I).mean() for own, best in zip(*both, strict=True)]
        assert np.mean(agree) > 0.985


@pytest.mark.parametrize(("rows_of_a_state", "widest"), [(1200, "nprobe=1"), (400, "nprobe=4")])
def test_rows_that_are_equally_near_are_no_loss(rows_of_a_state: int, widest: str) -> None:
    """Three states, every row of another item: which M of those that are equally near count is for their ids to say.

    Where 1,000 rows are those of all states, all of them must be found, though no top K can tell.
    """
    random = np.random.default_rng(0)
    vectors = np.repeat(random.standard_normal((3, 8)), rows_of_a_state, axis=0).astype(np.float16)
    ids = random.permutation(len(vectors))
    for factory, expected in (("Flat", ""), ("IVF4,Flat", widest)):
        search, quality = tune([shard_of(factory, vectors, np.arange(len(vectors)), ids)], target=1.0)
        assert (quality.recall_top_m, quality.recall_top_k) == (1, 1)
        assert search == expected


def test_lists_found_on_gpus_make_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with a copy of the means on the CPU in the place of those on GPUs."""
    factories = ("IVF4,Flat", "IVF4,SQfp16", "IVF4,PQ4x4", "HNSW16")
    here = [build(write_memory(tmp_path / "here"), factory=name) for name in factories]
    copies = []

    def to_all_gpus(index: Any) -> Any:
        copies.append(faiss.clone_index(index))
        return copies[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_all_gpus, raising=False)
    there = [build(write_memory(tmp_path / "there"), factory=name) for name in factories]
    assert [copy.ntotal for copy in copies] == 3 * [4, 4, 4, 4]  # k-means, then the means of three shards
    for (_, one), (_, other) in zip(here, there, strict=True):
        for own, same in zip(one.shards, other.shards, strict=True):
            assert own.files["faiss"].sha256 == same.files["faiss"].sha256


def test_a_common_offset_costs_no_precision() -> None:
    """Far from the origin float32 squares would swallow the differences."""
    random = np.random.default_rng(0)
    vectors = 3000 + random.standard_normal((500, 16)).astype(np.float32)
    search = VectorSearch.over(vectors, vectors.mean(axis=0).astype(float))
    ((numbers, _),) = search.search(vectors[:1], 10)
    assert numbers.size < 100  # the tolerance stays small
    assert 0 in numbers


def test_the_default_grows_with_the_shard() -> None:
    assert default_factory(1000, 576) == default_factory(faiss_index.EXACT_BELOW_ROWS, 576) == "Flat"
    assert default_factory(1_000_000, 576) == "IVF4096,SQfp16"
    assert default_factory(60_000_000, 2048) == "IVF32768_HNSW32,PQ64"
    assert default_factory(60_000_000, 576) == "IVF32768_HNSW32,PQ64"


def test_the_same_command_again_builds_nothing(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    _, first = build(workspace, factory="IVF4,Flat")
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in workspace.files("index")}
    assert build(workspace, factory="IVF4,Flat")[1] == first
    assert before == {path: (tmp_path / path).stat().st_mtime_ns for path in workspace.files("index")}


def test_a_second_attempt_at_a_step_takes_what_the_first_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker believed dead finishes after the one that replaced it; what it wrote is removed in the end."""
    workspace = write_memory(tmp_path)
    made = plan(workspace)
    for shard in range(3):
        sum_moments(made, shard)
    fitted, first = fit(made), build_shard(made, fit(made), 0)
    exists = Workspace.exists
    monkeypatch.setattr(Workspace, "exists", lambda self, path: path.endswith(".npz") and exists(self, path))
    assert fit(made) == fitted
    assert build_shard(made, fitted, 0) == first
    monkeypatch.undo()
    on_disk = set(workspace.files(made.folder))
    build(workspace)
    left = set(workspace.files(made.folder))
    assert len(on_disk - left) == 3 + 7  # a map, what means are, a trained index and the files of a shard
    ShardedIndex.open(workspace, made.manifest)


def test_an_index_is_tuned_again_for_another_recall_and_its_shards_are_kept(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    low, high = (build(workspace, factory="IVF16,PQ4x4", target_recall=target)[1] for target in (0.1, 0.95))
    assert low.shards == high.shards
    assert (low.search, low.quality.recall_top_k < high.quality.recall_top_k) == ("nprobe=1", True)


def test_what_codes_confuse_is_found_by_looking_at_more_candidates(tmp_path: Path) -> None:
    """16 codes for 600 rows: to search more widely finds nothing more."""
    manifest = build(write_memory(tmp_path), factory="IVF4,PQ1x4", target_recall=1.0)[1]
    assert manifest.quality.recall_top_k == 1
    assert "k_factor" in manifest.search


def test_a_recall_that_is_out_of_reach_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "MOST_K_FACTOR", 1)
    build(write_memory(tmp_path), factory="PQ1x4", target_recall=1.0)
    assert "of the exact top 20 at best, less than index.target_recall=1.0" in caplog.text


def test_a_memory_built_again_under_the_same_number_has_an_index_of_its_own(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    first = plan(workspace).folder
    workspace.delete("memory")
    write_memory(tmp_path, num_shards=2)
    assert plan(workspace).folder != first


def test_a_memory_without_rows_is_refused(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path, count=1)
    store = MemoryStore(workspace)
    with store.write_unit("nothing", identity(3)):
        pass
    store.take_snapshot(["nothing"], "d" * 64, 1.0)
    with pytest.raises(InputError, match=r"memory: snapshot 2 has no rows; memory/quarantine says why"):
        plan(workspace)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"factory": "Flt"}, r"index.factory='Flt': FAISS makes no index of dimension 8"),
        ({"factory": "IVF4,PQ3"}, r"index.factory='IVF4,PQ3': FAISS makes no index of dimension 8"),
        ({"factory": "IVF4096,Flat"}, r"index.factory='IVF4096,Flat': cannot be trained on 600 rows"),
        ({"factory": "PQ2x12"}, r"'PQ2x12': cannot be trained on 600 rows \(.*clusters \(4096\)\); use"),
        ({"factory": "NSG8"}, r"'NSG8': FAISS cannot add rows .* block by block \(.*NNDescent.*\); use another"),
        ({"factory": "IDMap,Flat"}, r"index.factory='IDMap,Flat': rows are numbered already"),
        ({"sample_fraction": 1e-9}, r"index.sample_fraction=1e-09: leaves no row"),
        ({"snapshot": 9}, r"snapshots/9.json: not found"),
    ],
)
def test_what_does_not_fit_the_memory_is_refused(tmp_path: Path, index: dict[str, object], message: str) -> None:
    workspace = write_memory(tmp_path)
    with pytest.raises(InputError, match=message):
        build(workspace, **index)


def test_items_that_occur_once_have_no_within_covariance(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path, count=1, num_shards=1, units=1)
    with pytest.raises(InputError, match=r"index.space='whiten-within': 1 rows of 1 items .* use index.space=none"):
        build(workspace)
    assert build(workspace, space="none")[1].rows == 1


def damaged(tmp_path: Path, name: str) -> tuple[Path, str]:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    return tmp_path / manifest.shards[1].files[name].path, made.manifest


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
        other = IndexManifest.read(index_workspace(tmp_path), manifest).shards[0].files[name]
        path.write_bytes((tmp_path / other.path).read_bytes())
        record = tmp_path / manifest
        record.write_text(record.read_text().replace(f'"bytes": {len(content)}', f'"bytes": {other.bytes}'))
    with pytest.raises(InputError, match=re.escape(str(path))):
        ShardedIndex.open(index_workspace(tmp_path), manifest)


def index_workspace(folder: Path) -> Workspace:
    return Workspace.open(str(folder))


def test_an_index_of_another_snapshot_is_refused(tmp_path: Path) -> None:
    workspace, other = write_memory(tmp_path / "one"), write_memory(tmp_path / "other", count=500)
    made, elsewhere = build(workspace)[0], build(other)[0]
    shutil.copy(tmp_path / "other" / elsewhere.manifest, tmp_path / "one" / made.manifest)
    with pytest.raises(InputError, match=r"index-0.995.json: is of snapshot 1 with digest \w{8}, but lies in 1-\w{8}"):
        ShardedIndex.open(workspace, made.manifest)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    (tmp_path / made.manifest).unlink()
    manifest.model_copy(update={"shards": manifest.shards[:2]}).write(workspace, made.manifest)
    with pytest.raises(InputError, match=r"index-0.995.json: lists shards \[0, 1\] of 3"):
        ShardedIndex.open(workspace, made.manifest)


def test_a_map_of_another_dimension_is_refused(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    (tmp_path / made.manifest).unlink()
    wider = manifest.identity.model_copy(update={"dimension": 16})
    manifest.model_copy(update={"identity": wider}).write(workspace, made.manifest)
    with pytest.raises(InputError, match=re.escape(f"{manifest.map.path}: of dimension 8, expected 16")):
        ShardedIndex.open(workspace, made.manifest)


def test_content_of_another_index_is_refused_where_it_is_verified(tmp_path: Path) -> None:
    """As a copy leaves it that was broken off: every size and shape as recorded."""
    path, manifest = damaged(tmp_path, "rows")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader = IndexReader.open(index_workspace(tmp_path), manifest)
    reader.shard(0, verify=True)
    reader.shard(1)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: its checksum is not the recorded one"):
        reader.shard(1, verify=True)


def test_a_file_of_a_newer_faiss_says_which(tmp_path: Path) -> None:
    path, manifest = damaged(tmp_path, "faiss")
    content = bytearray(path.read_bytes())
    content[:4] = b"IxZZ"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"FAISS .* cannot read it .* written by FAISS {faiss.__version__}"):
        ShardedIndex.open(index_workspace(tmp_path), manifest)


def test_the_manifest_says_what_it_is_of(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    assert IndexManifest.read(workspace, made.manifest) == manifest
    assert (manifest.rows, manifest.items, manifest.snapshot) == (600, 40, 1)
    assert manifest.identity == identity(3)
    on_disk = sum(file.bytes for shard in manifest.shards for file in shard.files.values())
    assert manifest.bytes_per_row == pytest.approx(on_disk / 600, abs=0.1)


def test_damaged_moments_are_refused_by_name(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made = plan(workspace)
    sum_moments(made, 0)
    (path,) = (tmp_path / made.base).glob("moments/*/shard=0.npz")
    for shard in (1, 2):
        sum_moments(made, shard)
    for content in (path.read_bytes()[:-100], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"shard=0.npz: damaged .*; delete it and run the job again"):
            fit(made)
