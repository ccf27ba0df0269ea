"""Erasure from the dataset and the memory, without Ray, with a tiny model."""

import itertools
import shutil
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.growing import Log, append, build_memory, prepare, random_log, titles_of
from support.in_process import run_here
from support.small_workspace import config_of, expected_ids, states_of

import l2d_ray
from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.interactions import user_hashes
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.schema import Split
from l2d_ray.stages.erasure import EraseResult, erase
from l2d_ray.workspace import Workspace

LOG = list(dict.fromkeys(random_log(500, users=20, items=15)))
TITLES = titles_of(LOG)
CUTS = (300, 400, len(LOG))
DAY = 86_400
DAY_0 = date(1970, 1, 1)


def settings(folder: Path, **changes: object) -> Config:
    return config_of(folder, **({"memory.units": 3, "history.max_items": 4, "history.stride": 3} | changes))


def opened(folder: Path) -> Dataset:
    return Dataset.open(Workspace.open(str(folder)))


def erased(
    folder: Path, users: Sequence[str] = (), items: Sequence[str] = (), before: str | None = None
) -> EraseResult:
    """Erase these from a workspace."""
    given = {"users": users, "items": items}
    for name, ids in given.items():
        (folder / f"{name}.txt").write_text("".join(f"{one}\n" for one in ids))
    files = {f"erase.{name}": folder / f"{name}.txt" for name, ids in given.items() if ids}
    return erase(settings(folder, **files, **({"erase.before": before} if before else {})), run_here)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose dataset and memory grew twice. A step of the log is a day."""
    folder = tmp_path_factory.mktemp("built")
    log = [(user, item, DAY * time) for user, item, time in LOG]
    dataset = prepare(folder, log[: CUTS[0]], TITLES)
    build_memory(settings(folder))
    for start, stop in itertools.pairwise(CUTS):
        dataset, _ = append(dataset, log[start:stop], TITLES)
        build_memory(settings(folder))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def history(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Return what is left of the histories, with times in days."""
    ids = opened(folder).items()["item_id"].to_pylist()
    found: dict[str, list[tuple[str, int]]] = {}
    for users in opened(folder).iter_users():
        for user in users.to_pylist():
            pairs = zip(user["item_indices"], user["timestamps"], strict=True)
            found[user["user_id"]] = [(ids[item], time // DAY) for item, time in pairs if item >= 0]
    return found


def left_of(
    log: Log, users: Sequence[str] = (), items: Sequence[str] = (), before: int = 0
) -> dict[str, list[tuple[str, int]]]:
    """Return the histories of a log without what was erased."""
    found: dict[str, list[tuple[str, int]]] = {}
    for user, item, time in log:
        if user not in users and item not in items and time >= before:
            found.setdefault(user, []).append((item, time))
    return found


@pytest.mark.parametrize(
    "selection",
    [
        {"users": ["u3", "u11", "nobody"]},
        {"items": ["i2", "i7"]},
        {"before": str(DAY_0 + timedelta(100))},
        {"users": ["u5"], "items": ["i1"], "before": str(DAY_0 + timedelta(250))},
    ],
)
def test_dataset_and_memory_are_without_what_was_erased(folder: Path, selection: dict) -> None:
    old_states, old_ids = states_of(folder), set(expected_ids(folder))
    old = opened(folder)
    result = erased(folder, **selection)
    before = int(np.datetime64(selection["before"]).astype("datetime64[D]").astype(int)) if "before" in selection else 0
    expected = left_of(LOG, selection.get("users", []), selection.get("items", []), before)
    assert history(folder) == expected
    new = opened(folder)
    assert (new.num_users, new.num_samples(Split.TRAIN)) == (
        len(expected),
        sum(len(items) - 1 for items in expected.values()),
    )
    assert (result.users, result.samples) == (old.num_users - new.num_users, len(old_ids) - len(expected_ids(folder)))
    assert result.version == new.version.number == 4
    assert result.unknown == ("nobody" in selection.get("users", []))
    # The states of the other samples, under the same ids, are as they were.
    states = states_of(folder)
    assert sorted(states) == expected_ids(folder)
    assert states.keys() < old_ids
    assert result.rows == len(old_states) - len(states)
    for sample, state in states.items():
        np.testing.assert_array_equal(state, old_states[sample])
    assert verify(new.workspace).problems == []
    snapshot = MemoryStore(new.workspace).snapshot()
    assert (snapshot.number, snapshot.rows, snapshot.dataset) == (result.snapshot, len(states), new.digest)


def test_what_was_erased_does_not_come_back(folder: Path) -> None:
    erased(folder, users=["u3"], items=["i2"])
    assert build_memory(settings(folder)) == MemoryStore(Workspace.open(str(folder))).snapshot()
    new: Log = [("u4", "i3", DAY * 900), ("u8", "new", DAY * 900)]
    _, refused = append(opened(folder), new, TITLES | {"new": "New"})
    assert not any(refused.values())
    snapshot = build_memory(settings(folder))
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert snapshot.deletions
    hashes = user_hashes(pa.array(["u3"])).tolist()
    rows = l2d_ray.read_memory(folder).to_table()
    assert rows.num_rows == snapshot.rows == len(states_of(folder))
    assert not set(hashes) & set(rows["user_hash"].to_pylist())
    again = settings(folder, **{"memory.sample_fraction": 0.5})
    build_memory(again)
    build_memory(settings(folder))  # of all samples again, from the dataset
    assert sorted(states_of(folder)) == expected_ids(folder)
