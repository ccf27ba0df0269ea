"""Compaction of the dataset and the memory, without Ray, with a tiny model."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.growing import append, build_memory, histories_of, prepare, random_log, titles_of
from support.in_process import run_here
from support.small_memory import build
from support.small_workspace import config_of, expected_ids, states_of

from l2d_ray.config import Config
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.interactions import user_hashes
from l2d_ray.memory.verify import verify
from l2d_ray.stages.compaction import CompactResult, compact
from l2d_ray.stages.erasure import erase
from l2d_ray.workspace import Workspace

LOG = list(dict.fromkeys(random_log(400, users=20, items=15)))
LOG = [(f"person-{user}", item, 1_000_000 + time) for user, item, time in LOG]
TITLES = titles_of(LOG)
CUTS = (200, 300, 350, len(LOG))
NOW = {"compact.keep_snapshots": 1, "compact.keep_days": 0, "compact.grace_hours": 0}
VICTIM = "person-u3"


def settings(folder: Path, **changes: object) -> Config:
    return config_of(folder, **({"memory.units": 3, "history.max_items": 4, "history.stride": 3} | changes))


def opened(folder: Path) -> Dataset:
    return Dataset.open(Workspace.open(str(folder)))


def compacted(folder: Path, **changes: object) -> CompactResult:
    return compact(settings(folder, **changes), run_here)


def erase_victim(folder: Path) -> None:
    path = folder.parent / f"{folder.name}-users.txt"
    path.write_text(VICTIM)
    erase(settings(folder, **{"erase.users": path}), run_here)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose dataset and memory grew three times."""
    folder = tmp_path_factory.mktemp("built")
    dataset = prepare(folder, LOG[: CUTS[0]], TITLES)
    build_memory(settings(folder))
    for start, stop in itertools.pairwise(CUTS):
        dataset, _ = append(dataset, LOG[start:stop], TITLES)
        build_memory(settings(folder))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "ws")
    return tmp_path / "ws"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file but the model, and of every column of Parquet as it is in memory."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and "model" not in path.relative_to(folder).parts:
            found[str(path)] = path.read_bytes()
            if path.suffix == ".parquet":
                for column in pq.read_table(path).combine_chunks().columns:
                    found[f"{path}:{column.type}"] = b"".join(
                        bytes(buffer) for chunk in column.chunks for buffer in chunk.buffers() if buffer
                    )
    return found


def traces(folder: Path, states: dict[int, np.ndarray], ids: list[int]) -> set[str]:
    """Return the files that hold the id of the erased user, its hash, or an id or state of its samples."""
    (user_hash,) = user_hashes(pa_array := __import__("pyarrow").array([VICTIM]))
    del pa_array
    numbers = [int(user_hash), *ids]
    needles = [VICTIM.encode(), *(str(number).encode() for number in numbers)]
    needles += [number.to_bytes(8, "little", signed=True) for number in numbers]
    needles += [states[sample].tobytes() for sample in ids]
    return {path for path, content in contents(folder).items() if any(needle in content for needle in needles)}


def ids_of_victim(folder: Path) -> list[int]:
    length = len(histories_of(opened(folder))[VICTIM])
    hashes = np.repeat(user_hashes(__import__("pyarrow").array([VICTIM])), length - 1)
    return sample_ids(hashes, np.arange(1, length)).tolist()


def test_nothing_of_an_erased_user_is_in_any_file(folder: Path) -> None:
    workspace = Workspace.open(str(folder))
    build(workspace, space="none")
    states, ids = states_of(folder), ids_of_victim(folder)
    assert set(ids) <= states.keys()
    old = traces(folder, states, ids)
    assert {Path(path).relative_to(folder).parts[0] for path in old} == {"dataset", "memory", "index"}
    erase_victim(folder)
    assert old <= traces(folder, states, ids)  # older snapshots are there for their readers
    build(workspace, space="none")
    result = compacted(folder, **NOW)
    assert traces(folder, states, ids) == set()
    assert (result.units, result.generations, result.pinned) == (1, 1, None)
    left = states_of(folder)
    assert sorted(left) == expected_ids(folder) == sorted(states.keys() - set(ids))
    for sample, state in left.items():
        np.testing.assert_array_equal(state, states[sample])
    assert verify(workspace).problems == []
    assert compacted(folder, **NOW).removed_files == 0
    # The workspace still grows.
    append(
        opened(folder), [("person-u4", "i3", 2_000_000), (VICTIM, "i1", 2_000_000), (VICTIM, "i2", 2_000_001)], TITLES
    )
    build_memory(settings(folder))
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert len(states_of(folder)) == len(left) + 2
