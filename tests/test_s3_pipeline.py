"""Jobs on a workspace in a real S3 server, while requests fail, two of them build at once and the server restarts."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.s3_server import Faults, S3Server, faulty_proxy
from support.small_training import LEARNING
from support.small_workspace import config_of, environment_of_scripts, states_of, wait_for

from l2d_ray.config import Config
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.build_memory import BuildResult, build_memory
from l2d_ray.distributed.evaluate import evaluate
from l2d_ray.distributed.training.driver import finetune
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]
UNITS = 12
EVALUATION = {"evaluate.recommenders": "[most-popular,l2d-global,l2d-local]", "evaluate.fractions": "[]"}


@pytest.fixture(scope="module")
def users() -> int:
    return 36


@pytest.fixture(scope="module")
def proxied(s3: S3Server) -> Iterator[tuple[Faults, int]]:
    """Run a proxy before the server; return its faults and its port."""
    faults = Faults()
    with faulty_proxy(s3, faults) as port:
        yield faults, port


@pytest.fixture(autouse=True)
def no_faults(proxied: tuple[Faults, int]) -> Iterator[None]:
    """Start every test without faults, and end them with it."""
    proxied[0].refused = proxied[0].lost = 0.0
    yield
    proxied[0].refused = proxied[0].lost = 0.0


@pytest.fixture
def remote(dataset: Path, s3: S3Server, proxied: tuple[Faults, int], request: pytest.FixtureRequest) -> str:
    """Return the URI of a copy of the dataset on the server."""
    uri = s3.uri(request.node.name, proxied[1])
    Workspace.open(str(dataset)).copy("dataset", Workspace.open(uri), "dataset")
    return uri


@pytest.fixture(scope="module")
def built(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Return a local workspace with a memory."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(dataset, folder, dirs_exist_ok=True)
    build_memory(config_of(folder, **{"memory.units": UNITS}))
    return folder


def config_at(uri: str, dataset: Path, **settings: Any) -> Config:
    return config_of(dataset, **{"memory.units": UNITS, "workspace": uri} | settings)


def assert_same_memory(uri: str, built: Path) -> None:
    """Check that the remote memory holds the rows of the local one, bit by bit, and no file that no record names."""
    workspace = Workspace.open(uri)
    ours, theirs = states_of(uri), states_of(str(built))
    assert ours.keys() == theirs.keys()
    for sample, state in ours.items():
        np.testing.assert_array_equal(state, theirs[sample])
    assert verify(workspace).problems == []
    named = [file.path for record in MemoryStore(workspace).units().values() for file in record.files]
    assert sorted(workspace.files("memory/data")) == sorted(named)


def test_every_stage_runs_and_gives_the_bytes_that_it_gives_on_a_disk(
    dataset: Path, remote: str, built: Path, proxied: tuple[Faults, int]
) -> None:
    proxied[0].refused = proxied[0].lost = 0.05
    tuned = finetune(config_at(remote, dataset, **LEARNING | {"finetune.epochs": 1, "finetune.name": "tuned"}))
    assert tuned.samples == 36 * 9
    base = {"model.adapter": "null"}
    build_memory(config_at(remote, dataset, **base))
    assert_same_memory(remote, built)
    ours, theirs = (build_index(config_at(place, dataset, **base)) for place in (remote, str(built)))
    assert replace(ours, index="", seconds=0) == replace(theirs, index="", seconds=0)
    digests = [_digests(Workspace.open(place)) for place in (remote, str(built))]
    assert digests[0] == digests[1]
    report = evaluate(config_at(remote, dataset, **base, **EVALUATION))
    assert [row["users"] for row in report.results] == [36] * 3


def _digests(workspace: Workspace) -> list[Any]:
    """Return the checksums of all files of the index's shards."""
    (path,) = [path for path in workspace.files("index") if Path(path).name.startswith("index-")]
    manifest = IndexManifest.read(workspace, path)
    return [{name: file.sha256 for name, file in shard.files.items()} for shard in manifest.shards]


def test_two_builders_at_once_lose_and_double_nothing_while_requests_fail(
    dataset: Path, remote: str, built: Path, proxied: tuple[Faults, int]
) -> None:
    proxied[0].refused = proxied[0].lost = 0.2
    results = _at_once(*[lambda: build_memory(config_at(remote, dataset))] * 2)
    assert [result.rows for result in results] == [36 * 9] * 2
    assert {result.snapshot for result in results} == {1}
    proxied[0].refused = proxied[0].lost = 0.0
    build_memory(config_at(remote, dataset))  # cleans up after both
    assert_same_memory(remote, built)


def test_a_worker_that_outlives_its_node_loses_and_doubles_nothing(
    dataset: Path, remote: str, built: Path, s3: S3Server, proxied: tuple[Faults, int]
) -> None:
    """Ray takes the worker for dead and repeats its unit elsewhere, while it still writes to a slow server."""
    proxied[0].refused = 0.5
    script = [sys.executable, str(Path(__file__).parent / "support/losing_nodes.py"), str(dataset), "zombie"]
    environ = environment_of_scripts() | {
        "WORKSPACE": remote,
        "UNDISTURBED": remote.replace(f":{proxied[1]}", f":{s3.port}"),
    }
    process = subprocess.run(script, env=environ, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])["zombie"]
    assert result["left"] > 0
    assert result["zombies"] > 0
    assert result["rows"] == 36 * 9
    proxied[0].refused = 0.0
    build_memory(config_at(remote, dataset))  # cleans up
    assert_same_memory(remote, built)


def test_a_build_goes_on_while_the_server_restarts(
    dataset: Path, remote: str, built: Path, s3: S3Server, ray_session: None
) -> None:
    results: list[BuildResult] = []
    build = threading.Thread(target=lambda: results.append(build_memory(config_at(remote, dataset))))
    build.start()
    store = MemoryStore(Workspace.open(remote))
    wait_for(lambda: time.sleep(0.2) or len(store.units()) >= 2)
    s3.stop()
    time.sleep(2)
    s3.start()
    build.join()
    assert results[0].rows == 36 * 9
    assert_same_memory(remote, built)


def _at_once(*calls: Callable[[], BuildResult]) -> list[BuildResult]:
    results: list[BuildResult] = []
    threads = [threading.Thread(target=lambda call=call: results.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
