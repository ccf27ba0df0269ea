import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.growing import Log, histories_of, random_log, titles_of
from support.small_workspace import JOBS, config_of, environment_of_cluster, expected_ids, states_of

from l2d_ray.config import Config, DataConfig
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.append import AppendResult
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.prepare import PrepareResult, prepare_or_append
from l2d_ray.workspace import Workspace

LOG = list(dict.fromkeys(random_log(600, users=30, items=20)))
TITLES = titles_of(LOG)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the items, and interactions by the rows of the log that they hold."""
    folder = tmp_path_factory.mktemp("raw")
    write_items(folder / "items.parquet", TITLES)
    write_log(folder / "0-300.parquet", LOG[:300])
    write_log(folder / "250-500.parquet", LOG[250:500])
    write_log(folder / "500-.parquet", LOG[500:])
    write_log(folder / "all.parquet", LOG)
    return folder


def write_items(path: Path, titles: dict[str, str]) -> None:
    pq.write_table(pa.table({"item_id": list(titles), "title": list(titles.values())}), path)


def write_log(path: Path, log: Log) -> None:
    users, items, times = zip(*log, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)


def prepared(raw: Path, workspace: Path, log: str, **data: Any) -> PrepareResult:
    paths = {"source": "table", "interactions": str(raw / log), "items": str(raw / "items.parquet")}
    settings = DataConfig(**({"split": "none", "min_interactions": 1, "num_blocks": 3} | paths | data))
    result = prepare_or_append(Config(workspace=str(workspace), data=settings))
    assert isinstance(result, PrepareResult)
    return result


def appended(path: Path, workspace: Path, **data: Any) -> AppendResult:
    settings = DataConfig(append=True, interactions=str(path), **data)
    result = prepare_or_append(Config(workspace=str(workspace), data=settings))
    assert isinstance(result, AppendResult)
    return result


def opened(workspace: Path) -> Dataset:
    return Dataset.open(Workspace.open(str(workspace)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_dataset_grows_as_if_prepared_at_once(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(raw, tmp_path / "once", "all.parquet")
    folder = tmp_path / "grown"
    first = prepared(raw, folder, "0-300.parquet")
    assert (first.train, first.valid, first.test) == (first.samples, 0, 0)
    future: Log = [("u1", "i1", int(time.time()) + 9_999), ("u1", "unknown", 99_999)]
    write_log(tmp_path / "future.parquet", [*LOG[250:500], *future])
    result = appended(tmp_path / "future.parquet", folder)
    assert result.refused == {"future": 1, "repeated": 50, "unknown_item": 1}
    assert "did not enter: 1 unknown_item, 1 future, 50 repeated; " in capsys.readouterr().err
    assert (result.version, result.new_interactions) == (2, 200)
    assert (result.samples, result.interactions) == (500 - result.users, 500)
    again = appended(raw / "250-500.parquet", folder)
    assert (again.version, again.new_interactions, again.refused) == (2, 0, {"repeated": 250})
    assert "nothing is new; the dataset stays at version 2" in capsys.readouterr().err
    appended(raw / "500-.parquet", folder)
    assert histories_of(opened(folder)) == histories_of(opened(tmp_path / "once"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_memory_of_a_grown_dataset_equals_one_built_at_once(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grown"
    prepared(raw, folder, "0-300.parquet")
    build_memory(config_of(folder, **{"memory.units": 2}))
    for log in ("250-500.parquet", "500-.parquet"):
        appended(raw / log, folder)
    result = build_memory(config_of(folder))
    assert (result.units, result.units_reused, result.snapshot) == (4, 2, 2)
    assert result.samples == len(expected_ids(folder))
    prepared(raw, tmp_path / "once", "all.parquet")
    build_memory(config_of(tmp_path / "once", **{"model.name": folder / "model", "memory.units": 2}))
    states, expected = states_of(folder), states_of(tmp_path / "once")
    assert states.keys() == expected.keys()
    for sample, state in states.items():
        np.testing.assert_allclose(state, expected[sample], rtol=1e-3, atol=1e-3)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_runs_that_append_at_once_both_enter(raw: Path, tmp_path: Path) -> None:
    prepared(raw, tmp_path, "0-300.parquet")
    results: list[AppendResult] = []
    for path in (tmp_path / "one.parquet", tmp_path / "other.parquet"):
        write_log(path, [(f"{path.stem} {user}", "i1", 1) for user in range(20)])
    runs = [
        threading.Thread(target=lambda path=path: results.append(appended(path, tmp_path)))
        for path in tmp_path.glob("*.parquet")
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(result.version for result in results) == [2, 3]
    assert len([user for user in histories_of(opened(tmp_path)) if " " in user]) == 40


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_killed_runs_leave_the_old_version_or_the_new_one(raw: Path, tmp_path: Path) -> None:
    prepared(raw, tmp_path, "0-300.parquet")
    job = [sys.executable, str(JOBS / "prepare_data.py"), f"workspace={tmp_path}"]
    grow = [*job, "data.append=true", f"data.interactions={raw / 'all.parquet'}"]

    def started_run() -> subprocess.Popen[bytes]:
        silent = subprocess.DEVNULL
        return subprocess.Popen(grow, env=environment_of_cluster(), stdout=silent, stderr=silent)

    old, started = opened(tmp_path).version, time.monotonic()
    whole = started_run()
    parts = tmp_path / "dataset/histories/2"
    # Kill one run as soon as it has written a part, and others at arbitrary moments before.
    while not parts.exists() and whole.poll() is None:
        time.sleep(0.001)
    whole.kill()
    whole.wait()
    seconds = time.monotonic() - started
    assert opened(tmp_path).version.number in (1, 2)
    for share in (0.5, 0.8, 0.95):
        run = started_run()
        time.sleep(share * seconds)
        run.kill()
        run.wait()
        version = opened(tmp_path).version
        assert version == old or version.number == 2
    done = appended(raw / "all.parquet", tmp_path)
    assert (done.version, done.interactions) == (2, len(LOG))
    listed = {part.path for part in opened(tmp_path).parts}
    assert set(Workspace.open(str(tmp_path)).files("dataset/histories", ".parquet")) == listed
    assert sum(map(len, histories_of(opened(tmp_path)).values())) == len(LOG)
