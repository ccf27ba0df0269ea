"""The steps from a memory to an index, without Ray: their files, their repetition and their errors."""

from pathlib import Path

import numpy as np
import pytest
from support.small_memory import build, by_local, identity, plan, states_near_rows, write_memory

from l2d_ray.errors import InputError
from l2d_ray.index import vector_search
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.stages.index_sums import sum_moments
from l2d_ray.stages.indexing import build_shard, fit
from l2d_ray.workspace import Workspace


@pytest.mark.parametrize(
    "factory", ["Flat", "SQfp16", "HNSW16", "IVF4,Flat", "IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4,RFlat", "PQ4x4"]
)
def test_any_factory_string_gives_exact_scores_and_measures_its_recall(tmp_path: Path, factory: str) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace, factory=factory)
    assert manifest.quality.queries >= 200
    assert manifest.quality.recall_top_k >= 0.995
    if factory == "Flat":
        assert (manifest.quality.recall_top_m, manifest.quality.recall_top_k) == (1, 1)
    if "IVF" in factory:
        assert manifest.search.startswith("nprobe=")
    index, states = ShardedIndex.open(workspace, made.manifest), states_near_rows()
    exact = ShardedIndex.open(workspace, build(workspace)[0].manifest)
    # With M beyond the memory every candidate is averaged, so an item whose rows are all found has its exact score.
    lists, exact_lists = by_local(index, states, 40, 600), by_local(exact, states, 40, 600)
    agree = [one.items_I[0] == other.items_I[0] for one, other in zip(lists, exact_lists, strict=True)]
    assert np.mean(agree) > 0.9


def test_a_share_of_the_memory_contains_every_smaller_share(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    larger, manifest = build(workspace, sample_fraction=0.5)
    smaller, _ = build(workspace, sample_fraction=0.3)
    ids = [
        {int(i) for shard in ShardedIndex.open(workspace, one.manifest).shards for i in shard.segments[0].sample_ids_M}
        for one in (smaller, larger)
    ]
    assert ids[0] < ids[1]
    assert len(ids[1]) == manifest.rows
    assert 0.4 < manifest.rows / 600 < 0.6


def test_a_repeated_build_writes_nothing(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    _, first = build(workspace, factory="IVF4,Flat")
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in workspace.files("index")}
    assert build(workspace, factory="IVF4,Flat")[1] == first
    assert before == {path: (tmp_path / path).stat().st_mtime_ns for path in workspace.files("index")}


def test_a_second_attempt_at_a_step_returns_the_record_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker believed dead may finish after its replacement. The files of the second attempt are removed."""
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
    before = set(workspace.files(made.folder))
    build(workspace)
    after = set(workspace.files(made.folder))
    assert len(before - after) == 4 + 7  # map, estimate of items, trained index and moments; the files of a shard
    ShardedIndex.open(workspace, made.manifest)


def test_another_target_recall_tunes_the_index_again_and_keeps_its_shards(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    low, high = (build(workspace, factory="IVF16,PQ4x4", target_recall=target)[1] for target in (0.1, 0.95))
    assert low.shards == high.shards
    assert (low.search, low.quality.recall_top_k < high.quality.recall_top_k) == ("nprobe=1", True)


def test_a_target_recall_out_of_reach_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_search, "MAX_K_FACTOR", 1)
    build(write_memory(tmp_path), factory="PQ1x4", target_recall=1.0)
    assert "index.factory='PQ1x4': finds at best 0." in caplog.text
    assert "of the exact top 20, less than index.target_recall=1.0; use a larger" in caplog.text


def test_the_manifest_describes_the_memory_and_the_files(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made, manifest = build(workspace)
    assert IndexManifest.read(workspace, made.manifest) == manifest
    assert (manifest.rows, manifest.items, manifest.snapshot) == (600, 40, 1)
    assert manifest.identity == identity(3)
    on_disk = sum(file.bytes for shard in manifest.shards for file in shard.all_files())
    assert manifest.bytes_per_row == pytest.approx(on_disk / 600, abs=0.1)


def test_a_memory_rebuilt_under_the_same_number_gets_another_index(tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match=r"memory: snapshot 2 has no rows; see memory/quarantine for the reasons"):
        plan(workspace)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"factory": "Flt"}, r"index.factory='Flt': FAISS cannot make an index of dimension 8 from it \(.*\); see the"),
        ({"factory": "IVF4,PQ3"}, r"index.factory='IVF4,PQ3': FAISS cannot make an index of dimension 8"),
        ({"factory": "IVF4096,Flat"}, r"index.factory='IVF4096,Flat': cannot be trained on 600 rows"),
        ({"factory": "PQ2x12"}, r"'PQ2x12': cannot be trained on 600 rows \(.*clusters \(4096\)\); use"),
        ({"factory": "NSG8"}, r"'NSG8': FAISS cannot add rows .* block by block \(.*NNDescent.*\); use another"),
        ({"factory": "IDMap,Flat"}, r"index.factory='IDMap,Flat': rows are numbered already; leave out IDMap"),
        ({"sample_fraction": 1e-9}, r"index.sample_fraction=1e-09: leaves no rows; raise it"),
        ({"snapshot": 9}, r"snapshots/9.json: not found"),
    ],
)
def test_a_setting_that_does_not_fit_the_memory_is_refused(
    tmp_path: Path, index: dict[str, object], message: str
) -> None:
    workspace = write_memory(tmp_path)
    with pytest.raises(InputError, match=message):
        build(workspace, **index)


def test_items_that_occur_once_have_no_within_covariance(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path, count=1, num_shards=1, units=1)
    with pytest.raises(InputError, match=r"index.space='whiten-within': 1 rows of 1 items .* use index.space=none"):
        build(workspace)
    assert build(workspace, space="none")[1].rows == 1


def test_damaged_moments_are_refused_by_name(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path)
    made = plan(workspace)
    for shard in range(3):
        sum_moments(made, shard)
    path = tmp_path / made.moments(0)
    for content in (path.read_bytes()[:-100], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"shard=0.npz: damaged .*; delete it and run jobs/build_index.py again"):
            fit(made)
