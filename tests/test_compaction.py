"""Compaction of a workspace that grew: few files, the same rows, and nothing of what was erased."""

import itertools
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from support.growing import Log, append, build_without_model, histories_of, prepare, random_log, titles_of
from support.keeping import AT_ONCE, compacted, erased, ids_of, opened, traces
from support.small_memory import build
from support.small_workspace import expected_ids, states_of

import l2d_ray
from l2d_ray.config import CompactConfig, Config, IndexConfig
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore, unit_path
from l2d_ray.memory.verify import verify
from l2d_ray.schema import Split
from l2d_ray.stages import compaction
from l2d_ray.stages.retention import expire
from l2d_ray.stages.settings import record_index
from l2d_ray.workspace import Workspace

LOG: Log = [(f"person-{user}", item, 10**6 + at) for user, item, at in dict.fromkeys(random_log(400, 20, 15))]
TITLES = titles_of(LOG)
CUTS = (200, 300, 350, len(LOG))
VICTIM = "person-u3"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose dataset and memory grew three times."""
    folder = tmp_path_factory.mktemp("built")
    dataset = prepare(folder, LOG[: CUTS[0]], TITLES)
    build_without_model(folder, refuse=9)
    for start, stop in itertools.pairwise(CUTS):
        dataset, _ = append(dataset, LOG[start:stop], TITLES)
        build_without_model(folder, refuse=9)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "ws")
    return tmp_path / "ws"


def store_of(folder: Path) -> MemoryStore:
    return MemoryStore(Workspace.open(str(folder)))


def files(folder: Path) -> set[str]:
    return set(Workspace.open(str(folder)).files(""))


def make_older(folder: Path, days: float, *names: str) -> None:
    """Give files the times of some days ago."""
    for path in folder.rglob("*"):
        if path.is_file() and (not names or path.name in names):
            os.utime(path, times=(time.time() - 86_400 * days,) * 2)


def test_nothing_of_an_erased_user_is_in_any_file(folder: Path) -> None:
    workspace, states = Workspace.open(str(folder)), states_of(folder)
    build(workspace, space="none")
    ids = ids_of(VICTIM, len(histories_of(opened(folder))[VICTIM]))
    old = traces(folder, VICTIM, ids)
    assert {path.split("/")[0] for path in old} == {"dataset", "memory", "index"}
    assert {path.split("/")[1] for path in old if path.startswith("memory")} == {"data", "quarantine"}
    erased(folder, users=[VICTIM])
    assert traces(folder, VICTIM, ids) == old  # older snapshots are there for their readers
    compacted(folder)
    assert traces(folder, VICTIM, ids) == old
    plan, _ = build(workspace, space="none")
    record_index(Config(workspace=str(folder), index=plan.config), plan.snapshot.number)
    assert compacted(folder, **AT_ONCE).pinned == []
    assert traces(folder, VICTIM, ids) == set()
    left = states_of(folder)
    assert left.keys() == states.keys() - set(ids)
    assert all(np.array_equal(state, states[sample]) for sample, state in left.items())
    assert verify(workspace).problems == []


def test_what_is_left_is_few_files_of_the_same_content(folder: Path) -> None:
    old, states, dataset = store_of(folder).snapshot(), states_of(folder), opened(folder)
    result = compacted(folder, **AT_ONCE)
    new = opened(folder)
    assert (result.units, result.generations, result.removed_snapshots) == (1, 1, 4)
    assert (result.rows, result.snapshot, new.digest) == (old.rows, 5, dataset.digest)
    assert histories_of(new) == histories_of(dataset.open(new.workspace, dataset.digest))
    assert new.items().equals(Dataset.open(new.workspace).items())
    assert (new.num_users, new.num_samples(Split.TRAIN)) == (dataset.num_users, dataset.num_samples(Split.TRAIN))
    found = states_of(folder)
    assert found.keys() == states.keys()
    assert all(np.array_equal(state, states[sample]) for sample, state in found.items())
    (unit,) = store_of(folder).live_units(store_of(folder).snapshot())
    assert (unit.rows, unit.quarantined) == (old.rows, old.quarantined)
    assert verify(new.workspace).problems == []
    left = [path for path in files(folder) if path.startswith(("memory/data", "memory/units", "memory/snapshots"))]
    assert len(left) == 2 + 1 + 1
    assert not [path for path in (folder / "memory").rglob("*") if path.is_dir() and not any(path.iterdir())]
    again = compacted(folder, **AT_ONCE)
    assert (again.snapshot, again.version, again.removed_files) == (5, result.version, 0)


def test_a_compacted_workspace_grows_and_erases(folder: Path) -> None:
    rows = compacted(folder, **AT_ONCE).rows
    append(opened(folder), [("person-u4", "i3", 2 * 10**6), ("nobody", "i1", 2 * 10**6)], TITLES)
    assert build_without_model(folder).rows == rows + 1
    erased(folder, users=["person-u5"])
    append(opened(folder), [("person-u6", "i3", 2 * 10**6)], TITLES)
    build_without_model(folder)
    result = compacted(folder, **AT_ONCE)
    assert (result.units, result.generations) == (1, 2)  # the first one is much larger
    left = store_of(folder).snapshot()
    assert left.rows + left.quarantined == opened(folder).num_samples(Split.TRAIN)
    assert verify(Workspace.open(str(folder))).problems == []


def test_generations_that_wait_for_the_memory_are_not_merged(folder: Path) -> None:
    for at in range(3):
        append(opened(folder), [("person-u4", "i3", 2 * 10**6 + at)], TITLES)
    result = compacted(folder, **AT_ONCE)
    assert result.generations == 1 + 3
    assert build_without_model(folder).rows == result.rows + 3
    assert compacted(folder, **AT_ONCE).generations == 2


def test_snapshots_are_kept_by_number_and_by_age(folder: Path) -> None:
    rows = l2d_ray.read_memory(folder, 4).to_table()
    assert compacted(folder).removed_snapshots == 0  # all are new
    make_older(folder, 8, "2.json", "3.json")
    # Snapshot 2 was replaced by snapshot 3, eight days ago, and snapshot 3 today.
    assert compacted(folder).removed_snapshots == 2
    assert [snapshot.number for snapshot in store_of(folder).snapshots()] == [3, 4, 5]
    assert l2d_ray.read_memory(folder, 4).to_table().equals(rows)
    assert compacted(folder, keep_days=0).removed_snapshots == 1
    assert Dataset.open(Workspace.open(str(folder)), store_of(folder).snapshot(4).dataset)
    with pytest.raises(InputError, match=r"snapshots/3\.json: not found"):
        l2d_ray.read_memory(folder, 3)


def test_the_snapshot_whose_index_was_built_last_is_kept(folder: Path) -> None:
    workspace = Workspace.open(str(folder))
    _, manifest = build(workspace, space="none", snapshot=2)
    record_index(Config(workspace=str(folder), index=IndexConfig(space="none")), 2)
    result = compacted(folder, **AT_ONCE)
    assert (result.pinned, result.removed_snapshots) == ([2], 3)
    assert all(workspace.exists(file.path) for file in manifest.all_files())
    build(workspace, space="none")
    record_index(Config(workspace=str(folder), index=IndexConfig(space="none")), 5)
    assert compacted(folder, **AT_ONCE).pinned == []
    assert {path.split("/")[1].split("-")[0] for path in files(folder) if path.startswith("index/")} == {
        "5",
        "settings.json",
    }


def test_the_files_that_a_kept_index_names_stay(folder: Path) -> None:
    workspace = Workspace.open(str(folder))
    build(workspace, space="none", snapshot=3)
    plan, manifest = build(workspace, space="none")
    assert (manifest.fitted.kept, len(manifest.fitted.segments)) == (1, 2)
    expire(workspace, CompactConfig(**AT_ONCE))
    ShardedIndex.open(workspace, plan.manifest)
    named = {file.path for file in manifest.all_files()} | {manifest.fitted.older}
    assert {path for path in workspace.files("index") if not path.startswith(plan.base)} <= named


def test_files_that_no_record_names_go_after_a_while(folder: Path) -> None:
    strays = [
        "memory/data/unit/shard=0/attempt.parquet",
        "memory/units/u.json.0123.tmp",
        "memory/deletions/u/0.parquet",
        "dataset/histories/9/part-0.parquet.0123.tmp",
        "dataset/items.parquet.0123.tmp",
        "memory/notes.txt",
    ]
    for path in strays:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")
    compacted(folder)
    assert set(strays) <= files(folder)
    make_older(folder, 1.1)
    compacted(folder)
    assert set(strays) & files(folder) == {"memory/notes.txt"}


def test_units_of_a_build_that_is_under_way_stay(folder: Path) -> None:
    units = set(store_of(folder).units())
    shutil.rmtree(folder / "memory/snapshots")
    make_older(folder, 100)
    make_older(folder, 0, f"{min(units)}.json")
    result = compacted(folder)
    assert result.generations == 4
    assert set(store_of(folder).units()) == units
    make_older(folder, 100)
    compacted(folder)
    assert store_of(folder).units() == {}


def test_units_that_were_built_again_after_a_killed_removal_stay(folder: Path) -> None:
    units = set(store_of(folder).units())
    shutil.rmtree(folder / "memory/snapshots")
    paths = {"paths": [unit_path(unit) for unit in units]}
    Workspace.open(str(folder)).write_json("memory/removals/killed.json", paths)
    make_older(folder, 100)
    make_older(folder, 99, "killed.json")
    make_older(folder, 0, *(f"{unit}.json" for unit in units - {min(units)}))
    compacted(folder)
    assert set(store_of(folder).units()) == units - {min(units)}


def test_an_append_during_a_compaction_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge, states = compaction.merge_units, states_of(folder)

    def grow_first(*arguments: object) -> object:
        monkeypatch.undo()
        append(opened(folder), [("person-u4", "i3", 2 * 10**6)], TITLES)
        build_without_model(folder)
        return merge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compaction, "merge_units", grow_first)
    result = compacted(folder, **AT_ONCE)
    assert (result.snapshot, result.units) == (6, 2)  # the new unit is in neither group
    assert len(states_of(folder)) == len(states) + 1
    assert verify(Workspace.open(str(folder))).problems == []


def test_an_erasure_during_a_compaction_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge, ids = compaction.merge_units, ids_of(VICTIM, len(histories_of(opened(folder))[VICTIM]))

    def erase_first(*arguments: object) -> object:
        monkeypatch.undo()
        erased(folder, users=[VICTIM])
        return merge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compaction, "merge_units", erase_first)
    compacted(folder, **AT_ONCE)
    compacted(folder, **AT_ONCE)
    assert traces(folder, VICTIM, ids) == set()
    assert verify(Workspace.open(str(folder))).problems == []


def test_a_build_that_lists_replaced_units_is_refused(folder: Path) -> None:
    old = store_of(folder).snapshot()
    compacted(folder)
    with pytest.raises(InputError, match=r"snapshots: another job replaced units meanwhile \(.*\); run the same comm"):
        store_of(folder).take_snapshot(old.units, old.dataset, 1.0, old.units)
    assert sorted(expected_ids(folder)) == expected_ids(folder)


def test_the_snapshot_whose_index_is_served_is_kept(folder: Path) -> None:
    workspace = Workspace.open(str(folder))
    plan, _ = build(workspace, space="none", snapshot=2)
    workspace.write_json("serving/release.json", {"releases": [{"index": plan.manifest}]})
    assert compacted(folder, **AT_ONCE).pinned == [2]
    workspace.delete("serving")
    assert compacted(folder, **AT_ONCE).pinned == []


def test_units_without_samples_are_merged(tmp_path: Path) -> None:
    """All rows of the first unit are erased, or its users have one interaction each."""
    for name, users in (("erased", ["b"]), ("short", [])):
        folder = tmp_path / name
        prepare(folder, [("a", "x", 1), ("b", "y", 2), ("b", "x", 3), ("c", "x", 1)], {"x": "Title x", "y": "Title y"})
        build_without_model(folder)
        if users:
            erased(folder, users=users)
        assert compacted(folder, **AT_ONCE).units == 1
        assert sorted(states_of(folder)) == expected_ids(folder)
        assert l2d_ray.read_memory(folder).schema.names[:2] == ["sample_id", "user_hash"]
