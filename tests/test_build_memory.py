import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support.small_workspace import (
    command,
    config_of,
    environment_of_cluster,
    environment_of_scripts,
    expected_ids,
    kill_worker,
    states_of,
    wait_for,
    write_dataset,
)
from support.tiny_models import save_adapter, save_tiny

from l2d_ray.distributed.build_memory import BuildResult, build_memory
from l2d_ray.errors import InputError
from l2d_ray.memory.verify import verify
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]
UNITS, USERS = 30, 150


@pytest.fixture(scope="module")
def users() -> int:
    return USERS


@pytest.fixture(scope="module")
def built(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, BuildResult]:
    """Return a workspace with a memory, and the result of building it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(dataset, folder, dirs_exist_ok=True)
    return folder, build_memory(config_of(folder, **{"memory.units": UNITS}))


@pytest.fixture(scope="module")
def uninterrupted(built: tuple[Path, BuildResult]) -> tuple[dict[int, np.ndarray], BuildResult]:
    """Return the states of a build without a fault, and its result."""
    folder, result = built
    return states_of(folder), result


def committed(folder: Path) -> int:
    return len(list((folder / "memory" / "units").glob("*.json")))


def assert_whole(folder: Path, uninterrupted: tuple[dict[int, np.ndarray], BuildResult]) -> None:
    """Check that each sample is there once, with the state of an uninterrupted build, and that `verify` agrees."""
    states = states_of(folder)
    assert sorted(states) == expected_ids(folder) == sorted(uninterrupted[0])
    for sample, state in states.items():
        np.testing.assert_allclose(state, uninterrupted[0][sample], rtol=1e-3, atol=1e-3)
    assert verify(Workspace.open(str(folder))).problems == []


def test_the_result_counts_the_samples_of_the_memory(
    dataset: Path, uninterrupted: tuple[dict[int, np.ndarray], BuildResult]
) -> None:
    states, result = uninterrupted
    assert sorted(states) == expected_ids(dataset)
    assert result.samples == result.rows == len(states) == USERS * 9
    assert (result.quarantined, result.units, result.units_reused, result.snapshot) == (0, UNITS, 0, 1)
    assert 0 < result.tokens < result.tokens_one_by_one
    assert result.samples_per_second > 0


def test_the_same_command_again_reuses_everything(built: tuple[Path, BuildResult]) -> None:
    folder, first = built
    again = build_memory(config_of(folder, **{"memory.units": UNITS}))
    assert (again.units_reused, again.snapshot) == (UNITS, first.snapshot)
    assert (again.samples, again.tokens, again.samples_per_second) == (first.samples, first.tokens, 0)


def test_a_smaller_fraction_is_a_subset(folder: Path, ray_session: None) -> None:
    some, more = (
        build_memory(config_of(folder, **{"memory.units": 2, "memory.sample_fraction": share})).snapshot
        for share in (0.3, 0.5)
    )
    assert (some, more) == (1, 2)
    thirty, fifty = (states_of_snapshot(folder, number) for number in (some, more))
    assert thirty < fifty < set(expected_ids(folder))


def states_of_snapshot(folder: Path, number: int) -> set[int]:
    from l2d_ray.memory.store import MemoryStore

    store = MemoryStore(Workspace.open(str(folder)))
    return {int(i) for rows in store.read(store.snapshot(number)) for i in rows.column("sample_id").to_pylist()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"history.stride": 1}, "history.stride=1: {} records 10; leave history.stride out, or "),
        ({"history.max_items": 5}, "history.max_items=5: {} records 10; "),
        ({"prompt.suffix": "And then:"}, "prompt.suffix='And then:': {} records ''; "),
        ({"model.num_layers": 1}, "model.num_layers=1: {} records None; "),
        ({"memory.num_shards": 3}, "memory.num_shards=3: {} records 2; "),
        ({"model.dtype": "bfloat16"}, "model.dtype='bfloat16': {} records 'float32'; "),
    ],
)
def test_a_memory_made_in_another_way_is_refused(
    built: tuple[Path, BuildResult], change: dict[str, object], named: str
) -> None:
    folder, _ = built
    with pytest.raises(InputError) as refused:
        build_memory(config_of(folder, **{"memory.units": UNITS} | change))
    assert str(refused.value).startswith(named.format(folder / "memory/settings.json"))


def test_a_memory_of_another_model_or_adapter_is_refused(built: tuple[Path, BuildResult], tmp_path: Path) -> None:
    folder, _ = built
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"was made with another base_model \(\w{12}, now \w{12}\); use another"):
        build_memory(config_of(folder, **{"model.name": other}))
    adapter = save_adapter(tmp_path / "adapter", str(folder / "model"))
    with pytest.raises(InputError, match=r"was made with another adapter \(None, now \w{12}\); use another"):
        build_memory(config_of(folder, **{"model.adapter": adapter}))


def test_without_a_dataset_the_job_to_run_is_named(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(InputError, match=r"dataset.json: not found; run jobs/prepare_data.py first"):
        build_memory(config_of(tmp_path))


def test_a_killed_driver_loses_no_committed_unit(
    folder: Path, uninterrupted: tuple[dict[int, np.ndarray], BuildResult]
) -> None:
    job = command("build_memory", folder, **{"memory.units": UNITS, "workers.max": 2})
    silent = subprocess.DEVNULL
    process = subprocess.Popen(job, env=environment_of_cluster(), stdout=silent, stderr=silent)
    wait_for(lambda: committed(folder) >= 5)
    process.kill()
    process.wait()
    survived = committed(folder)
    assert survived < UNITS
    result = build_memory(config_of(folder, **{"memory.units": UNITS}))
    assert survived <= result.units_reused < UNITS
    assert result.rows == len(uninterrupted[0])
    assert_whole(folder, uninterrupted)


def test_a_killed_worker_is_replaced(
    folder: Path, ray_session: None, uninterrupted: tuple[dict[int, np.ndarray], BuildResult]
) -> None:
    results: list[BuildResult] = []
    config = config_of(folder, **{"memory.units": UNITS, "workers.max": 2})
    build = threading.Thread(target=lambda: results.append(build_memory(config)))
    build.start()
    wait_for(lambda: committed(folder) >= 3)
    kill_worker("MapWorker")
    assert committed(folder) < UNITS
    build.join()
    assert results[0].rows == len(uninterrupted[0])
    assert_whole(folder, uninterrupted)


def test_after_a_full_or_a_read_only_disk_the_same_command_resumes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, uninterrupted: tuple[dict[int, np.ndarray], BuildResult]
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    disk = scratch / "workspace"
    disk.mkdir()
    _, *job = command("build_memory", folder, **{"memory.units": UNITS, "workspace": disk})
    namespace = ["unshare", "--user", "--map-root-user", "--mount", sys.executable]
    process = subprocess.run(
        [*namespace, Path(__file__).parent / "support/failing_disk.py", disk, folder, *job],
        env=environment_of_scripts(),
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    runs = json.loads(process.stdout.splitlines()[-1])
    for fault, message in (("full", "No space left on device"), ("read-only", "Read-only file system")):
        status, _, stderr = runs[fault]
        (error,) = [line for line in stderr.splitlines() if "error" in line.lower()]
        assert status == 1
        assert error.startswith("error: ")
        assert message in error
        assert "run the same command again" in error
    status, stdout, _ = runs["resumed"]
    assert status == 0
    assert 0 < json.loads(stdout.splitlines()[-1])["units_reused"] < UNITS
    shutil.copytree(scratch / "memory", folder / "memory")
    assert_whole(folder, uninterrupted)


PEAK_MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from l2d_ray.command_line import load_config
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import identify_memory
from l2d_ray.stages.extraction import UnitExtractor, plan_units
from l2d_ray.workspace import Workspace
config = load_config(sys.argv[1:])
extractor = UnitExtractor(config, identify_memory(config))
for unit in plan_units(config, Dataset.open(Workspace.open(config.workspace))):
    extractor.build(unit)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    peaks = []
    for users in (200, 1000):
        folder = tmp_path / str(users)
        write_dataset(folder, users, length=42)
        job = command("build_memory", folder, **{"memory.units": 1, "model.num_layers": 1})
        peak = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *job[2:]], capture_output=True, text=True, check=True)
        peaks.append(int(peak.stdout))
    assert peaks[1] < 1.15 * peaks[0]


def test_a_relative_workspace_in_a_submitted_job_is_refused(tmp_path: Path) -> None:
    environ = os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    job = command("build_memory", tmp_path, workspace="results")
    process = subprocess.run(job, env=environ, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: workspace='results': a submitted job runs in a temporary copy of this folder, where the result would be"
        " lost; give an absolute path or a URI"
    ]
