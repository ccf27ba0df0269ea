"""A workspace with a small dataset and a tiny model, and jobs on it as commands."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset, write_manifest, write_part
from l2d_ray.encoding import identify_memory
from l2d_ray.memory.manifest import UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import HISTORIES, ITEMS, Split, hidden_states
from l2d_ray.stages.extraction import UnitExtractor, plan_units
from l2d_ray.workspace import Workspace
from support.tiny_models import save_tiny

JOBS = Path(__file__).parents[2] / "jobs"
ITEM_COUNT = 30


def write_dataset(folder: Path, users: int, length: int = 12, seed: int = 0, daily: bool = False) -> Dataset:
    """Write histories of `length` items, of which the last two are for validation and test.

    Each second has an item of every user. With `daily`, each day has one, and users begin on different days.
    """
    random, starts = np.random.default_rng(seed), np.random.default_rng(seed).integers(0, 9, users)
    rows = [
        {
            "user_id": f"u{user}",
            "user_hash": user * 1_000_003,
            "item_indices": random.integers(0, ITEM_COUNT, length).tolist(),
            "timestamps": [86_400 * (int(starts[user]) + n) if daily else n for n in range(length)],
            "splits": [Split.NONE, *[Split.TRAIN] * (length - 3), Split.VALID, Split.TEST],
        }
        for user in range(users)
    ]
    items = [{"item_index": i, "item_id": f"i{i}", "title": f"Title {i} of the year"} for i in range(ITEM_COUNT)]
    workspace = Workspace.open(str(folder))
    parts = [write_part(workspace, 0, pa.Table.from_pylist(rows, schema=HISTORIES))]
    write_manifest(workspace, pa.Table.from_pylist(items, schema=ITEMS), parts, {"users": users})
    return Dataset.open(workspace)


def arguments(folder: Path, **overrides: Any) -> list[str]:
    """Return the command line of a job on `folder`, with the tiny model there, which is made if it is missing."""
    model = folder / "model"
    if not model.exists():
        save_tiny(model)
    settings = {"workspace": folder, "model.name": model, "workers.max": 1, "memory.num_shards": 2} | overrides
    return [f"{key}={value}" for key, value in settings.items()]


def config_of(folder: Path, **overrides: Any) -> Config:
    return load_config(arguments(folder, **overrides))


def command(job: str, folder: Path, **overrides: Any) -> list[str]:
    return [sys.executable, str(JOBS / f"{job}.py"), *arguments(folder, **overrides)]


def environment() -> dict[str, str]:
    """Return an environment in which a job starts another Ray than that of the tests."""
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}


def environment_of_cluster() -> dict[str, str]:
    """Return an environment in which a job joins the Ray of the tests, which must run."""
    import ray

    return environment() | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def environment_of_scripts() -> dict[str, str]:
    """Return such an environment for a script of tests/support, which imports its neighbours."""
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return environment() | {"PYTHONPATH": os.pathsep.join(path)}


def run_job(job: str, folder: Path, **overrides: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(job, folder, **overrides), env=environment(), capture_output=True, text=True, check=False
    )


def refusal(job: str, folder: Path, monkeypatch: Any, capsys: Any, **overrides: Any) -> list[str]:
    """Run a job in this process, on the Ray of the tests. It must exit with status 2; return its lines on stderr."""
    _, script, *settings = command(job, folder, **overrides)
    capsys.readouterr()  # drop the output of making the model
    monkeypatch.setattr(sys, "argv", [script, *settings])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    lines: list[str] = capsys.readouterr().err.splitlines()
    return lines


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until the condition holds. Fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def workers(name: str) -> list[psutil.Process]:
    """Return the descendants of this process with `name` in their command line, oldest first."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found[process.create_time()] = process
    return [found[started] for started in sorted(found)]


def kill_worker(name: str) -> None:
    """Kill the youngest of these processes, because older ones may be ending already."""
    found = workers(name)
    assert found, f"no process of {name} runs"
    found[-1].kill()


def result_of(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON object of the last line on stdout of a successful job."""
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def build_units(config: Config) -> list[UnitRecord]:
    """Build every unit of the memory, without Ray."""
    extractor = UnitExtractor(config, identify_memory(config))
    units = plan_units(config, Dataset.open(Workspace.open(config.workspace)))
    return [extractor.build(unit) for unit in units]


def expected_ids(folder: Path) -> list[int]:
    """Return the ids of all training samples, sorted."""
    ids: list[int] = []
    for users in Dataset.open(Workspace.open(str(folder))).iter_users():
        for user in users.to_pylist():
            positions = np.flatnonzero(np.array(user["splits"]) == Split.TRAIN)
            ids += sample_ids(np.full(positions.size, user["user_hash"]), positions).tolist()
    return sorted(ids)


def states_of(folder: Path | str) -> dict[int, np.ndarray]:
    """Return the state of every sample of the newest snapshot. Fails if an id occurs twice."""
    store = MemoryStore(Workspace.open(str(folder)))
    states: dict[int, np.ndarray] = {}
    for rows in store.read(store.snapshot()):
        for sample, state in zip(rows.column("sample_id").to_pylist(), hidden_states(rows), strict=True):
            assert sample not in states
            states[sample] = state
    return states
