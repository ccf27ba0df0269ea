"""Erasure from the dataset and the memory of a workspace that grew."""

import itertools
import shutil
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.growing import Log, append, build_without_model, histories_of, prepare, random_log, titles_of
from support.keeping import erased, opened, run_here
from support.small_workspace import expected_ids, states_of, write_dataset

import l2d_ray
from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.interactions import user_hashes
from l2d_ray.data.samples import first_times, iter_samples, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.schema import Split
from l2d_ray.stages import erasure
from l2d_ray.stages.extraction import plan_growth
from l2d_ray.workspace import Workspace

DAY, DAY_0 = 86_400, date(1970, 1, 1)
LOG: Log = list(dict.fromkeys(random_log(500, users=20, items=15)))  # times in days
TITLES = titles_of(LOG)
CUTS = (300, 400, len(LOG))
Histories = dict[str, list[tuple[str, int]]]


def in_seconds(log: Log) -> Log:
    return [(user, item, DAY * time) for user, item, time in log]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose dataset and memory grew twice."""
    folder = tmp_path_factory.mktemp("built")
    dataset = prepare(folder, in_seconds(LOG[: CUTS[0]]), TITLES)
    build_without_model(folder)
    for start, stop in itertools.pairwise(CUTS):
        dataset, _ = append(dataset, in_seconds(LOG[start:stop]), TITLES)
        build_without_model(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "ws")
    return tmp_path / "ws"


def history(dataset: Dataset) -> Histories:
    """Return what is left of the histories, with times in days."""
    found = histories_of(dataset)
    return {user: [(item, at // DAY) for item, at in interactions] for user, interactions in found.items()}


def left_of(log: Log, users: Sequence[str] = (), items: Sequence[str] = (), before: date = DAY_0) -> Histories:
    """Return the histories of a log without what was erased."""
    found: Histories = {}
    for user, item, time in log:
        if user not in users and item not in items and time >= (before - DAY_0).days:
            found.setdefault(user, []).append((item, time))
    return found


@pytest.mark.parametrize(
    "selection",
    [
        {"users": ["u3", "u11", "nobody"]},
        {"items": ["i2", "i7"]},
        {"before": DAY_0 + timedelta(100)},
        {"users": ["u5"], "items": ["i1"], "before": DAY_0 + timedelta(320)},
    ],
)
def test_dataset_and_memory_are_without_what_was_erased(folder: Path, selection: dict[str, Any]) -> None:
    old, old_states = opened(folder), states_of(folder)
    result = erased(folder, **selection)
    new, states, expected = opened(folder), states_of(folder), left_of(LOG, **selection)
    assert history(new) == expected
    samples = sum(len(items) - 1 for items in expected.values())
    assert (new.num_users, new.num_samples(Split.TRAIN)) == (len(expected), samples)
    assert training_interactions(new).targets.size == samples
    assert sorted(states) == expected_ids(folder)
    # The other samples have the ids and the states that they had.
    assert states.keys() < old_states.keys()
    assert all(np.array_equal(state, old_states[sample]) for sample, state in states.items())
    assert verify(new.workspace).problems == []
    snapshot = MemoryStore(new.workspace).snapshot()
    assert (snapshot.rows, snapshot.dataset) == (len(states), new.digest)
    assert (result.version, result.snapshot) == (new.version.number, snapshot.number) == (4, 4)
    assert (result.users, result.samples) == (old.num_users - new.num_users, len(old_states) - samples)
    assert result.rows == result.samples
    assert result.unknown == ("nobody" in selection.get("users", []))


def test_an_item_appears_with_its_first_interaction_that_is_left(folder: Path) -> None:
    erased(folder, items=["i2"])
    dataset, expected = opened(folder), dict[str, int]()
    for interactions in histories_of(dataset).values():
        for item, time in interactions:
            expected[item] = min(time, expected.get(item, time))
    never = np.iinfo(np.int64).max
    item_ids = dataset.items()["item_id"].to_pylist()
    assert "i2" not in expected
    assert first_times(dataset).tolist() == [expected.get(item, never) for item in item_ids]


def test_older_versions_and_snapshots_stay_as_they_were(folder: Path) -> None:
    old = opened(folder)
    before, rows = history(old), l2d_ray.read_memory(folder).to_table()
    erased(folder, users=["u3"], items=["i2"])
    assert history(Dataset.open(old.workspace, old.digest)) == before
    assert l2d_ray.read_memory(folder, snapshot=3).to_table().equals(rows)


def test_a_reader_of_the_memory_does_not_see_erased_rows(folder: Path) -> None:
    erased(folder, users=["u3"])
    (user_hash,) = user_hashes(pa.array(["u3"])).tolist()
    rows = l2d_ray.read_memory(folder)
    assert rows.count_rows() == len(states_of(folder))
    assert user_hash not in rows.to_table()["user_hash"].to_pylist()
    assert rows.schema.names == ["sample_id", "user_hash", "item_index", "timestamp", "hidden_state", "unit"]


def test_what_was_erased_does_not_come_back(folder: Path) -> None:
    erased(folder, users=["u3"], items=["i2"], before=DAY_0 + timedelta(50))
    snapshot = MemoryStore(Workspace.open(str(folder))).snapshot()
    assert build_without_model(folder) == snapshot
    append(opened(folder), in_seconds([("u4", "i3", 900), ("u8", "new", 900)]), TITLES | {"new": "New"})
    grown = build_without_model(folder)
    assert grown.rows == snapshot.rows + 2
    assert grown.deletions == snapshot.deletions
    assert sorted(states_of(folder)) == expected_ids(folder)
    # Nor if all is built again from the dataset, while older units are still committed.
    build_without_model(folder, fraction=0.5)
    build_without_model(folder)
    assert sorted(states_of(folder)) == expected_ids(folder)


def test_a_user_who_was_erased_may_come_again(folder: Path) -> None:
    erased(folder, users=["u3"])
    append(opened(folder), in_seconds([("u3", "i1", 900), ("u3", "i2", 901)]), TITLES)
    build_without_model(folder)
    assert history(opened(folder))["u3"] == [("i1", 900), ("i2", 901)]
    assert sorted(states_of(folder)) == expected_ids(folder)
    (user_hash,) = user_hashes(pa.array(["u3"])).tolist()
    assert l2d_ray.read_memory(folder).to_table()["user_hash"].to_pylist().count(user_hash) == 1


def test_the_same_command_again_changes_nothing(folder: Path) -> None:
    erased(folder, users=["u3"], items=["i2"])
    result = erased(folder, users=["u3"], items=["i2"])
    assert (result.version, result.snapshot, result.users, result.samples, result.rows) == (4, 4, 0, 0, 0)


def test_samples_of_the_quarantine_are_erased(tmp_path: Path) -> None:
    prepare(tmp_path / "ws", LOG, TITLES)
    build_without_model(tmp_path / "ws", refuse=3)
    result = erased(tmp_path / "ws", users=["u3", "u4", "u5"])
    assert 0 < result.quarantined < result.rows
    assert result.rows + result.quarantined == result.samples
    assert verify(opened(tmp_path / "ws").workspace).problems == []


def test_a_dataset_with_a_split_loses_samples_of_every_split(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "ws", users=40)
    targets = [batch.targets for batch in iter_samples(dataset, Split.TEST)]
    lost = int(np.count_nonzero(np.concatenate(targets) == 1))
    erased(tmp_path / "ws", items=["i1"])
    assert 0 < lost == 40 - opened(tmp_path / "ws").num_samples(Split.TEST)


def test_a_memory_of_before_an_erasure_does_not_grow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(erasure, "_erase_memory", killed)
        with pytest.raises(OSError, match="killed"):
            erased(folder, users=["u3"])
    append(opened(folder), in_seconds([("u3", "i1", 900)]), TITLES)
    with pytest.raises(
        InputError, match=r"memory: snapshot 3 has rows that were erased from the dataset; run jobs/era"
    ):
        build_without_model(folder)
    # The user is back in the dataset, whose new sample must be in the memory before it can be erased.
    with pytest.raises(InputError, match=r"snapshot 4 of the memory lacks samples of version 5; run jobs/build_memory"):
        erased(folder, users=["u3"])
    build_without_model(folder)
    erased(folder, users=["u3"])
    assert "u3" not in history(opened(folder))
    assert sorted(states_of(folder)) == expected_ids(folder)


def test_a_memory_that_cannot_catch_up_with_an_erasure_is_built_again(folder: Path) -> None:
    workspace = Workspace.open(str(folder))
    before = MemoryStore(workspace).snapshot(1)
    erased(folder, users=["u3"])
    config = Config(workspace=str(folder))
    kept, units = plan_growth(config, opened(folder), before, before.units)
    assert kept == []
    assert len({unit.generation for unit in units}) == 3


def test_what_would_leave_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"dataset: no history would be left; delete the workspace, or erase less"):
        erased(folder, before=date(2030, 1, 1))
    assert history(opened(folder)) == left_of(LOG)


def test_a_command_that_names_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"erase\.users, erase\.items and erase\.before are missing; give at least"):
        erased(folder)


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, **selection: Any) -> None:
    """Erase from the dataset, and stop before the memory."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(erasure, "_erase_memory", killed)
        patched.setattr(erasure, "_finish_erasure", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            erased(folder, **selection)


def test_another_erasure_completes_one_that_was_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = len(states_of(folder))
    interrupted(folder, monkeypatch, users=["u3"])
    interrupted(folder, monkeypatch, items=["i2"], before=DAY_0 + timedelta(20))
    result = erased(folder, users=["u5"])
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert result.rows == rows - len(expected_ids(folder)) > 0
    assert build_without_model(folder).rows == len(expected_ids(folder))
    assert verify(opened(folder).workspace).problems == []


def test_an_erasure_during_the_first_build_is_completed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, take = tmp_path / "ws", MemoryStore.take_snapshot
    prepare(folder, LOG, TITLES)

    def slow(*arguments: Any) -> Any:
        erased(folder, users=["u3"])
        return take(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryStore, "take_snapshot", slow)
        build_without_model(folder)
    assert sorted(states_of(folder)) != expected_ids(folder)
    erased(folder, users=["u5"])
    assert sorted(states_of(folder)) == expected_ids(folder)


def test_a_snapshot_has_the_items_of_its_own_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(folder, monkeypatch, users=["u3"])
    append(opened(folder), [("u4", "new", DAY * 10**5)], TITLES | {"new": "A new item"})
    erased(folder, users=["u3"])
    store = MemoryStore(opened(folder).workspace)
    digest = store.snapshot().dataset
    assert store.items(digest).equals(Dataset.open(store.workspace, digest).items())
    assert len(store.items(digest)) == len(TITLES)


def test_ids_are_taken_as_they_stand_in_the_file(tmp_path: Path) -> None:
    folder, users = tmp_path / "ws", tmp_path / "users.txt"
    prepare(folder, [(user, item, 1) for user in ("ann", "ann ", "bob", "eve") for item in ("i1", "i2")], TITLES)
    users.write_bytes(b"\xef\xbb\xbfbob\r\nann \n\n")
    config = Config().replace({"workspace": str(folder), "erase.users": str(users)})
    assert erasure.erase(config, run_here).unknown == 0
    assert histories_of(opened(folder)).keys() == {"ann", "eve"}
