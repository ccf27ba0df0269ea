import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from support import s3_server

if TYPE_CHECKING:
    from support.small_endpoint import LocalEngine

    from l2d_ray.models.backbone import Backbone


def pytest_configure() -> None:
    """Give this session's Ray a new token, normal priority and one thread per worker, and the keys of the S3 server.

    Ray reads the token when it is imported, and starts workers at niceness 15. With more threads than cores, the
    threads of one matrix product wait for each other.
    """
    token = secrets.token_hex(32)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }
    os.environ |= s3_server.ENVIRONMENT
    settings.register_profile("busy machine", deadline=None)
    settings.load_profile("busy machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start Ray: the longest last would keep one process waiting for the other."""
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: (item.path not in with_ray, item.path.name != "test_workspace_alone.py"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say in the last lines if the page was not tested."""
    from support.chromium import MISSING

    yield
    reports = terminalreporter.getreports("skipped")
    if skipped := sum(MISSING in str(report.longrepr) for report in reports):
        terminalreporter.section("the page was not tested", red=True, bold=True)
        terminalreporter.line(f"{MISSING}: skipped {skipped} tests of the page; run apt-get install chromium")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Start a Ray for this test session, with more logical CPUs than a small machine has."""
    import ray

    from l2d_ray.distributed.job import quiet_ray_data
    from l2d_ray.distributed.ray_settings import KEEP_IDLE_WORKERS, set_local_variables

    set_local_variables()
    # Workers import recommenders that tests add. Ray gives them only the folder of the command.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config=KEEP_IDLE_WORKERS)
    quiet_ray_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """Run a real S3 server."""
    with s3_server.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def dataset(users: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a workspace with a model and a dataset of `users` users, a fixture of the test module."""
    from support.small_workspace import config_of, write_dataset

    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, users)
    config_of(folder)
    return folder


@pytest.fixture
def folder(dataset: Path, tmp_path: Path) -> Path:
    """Copy that workspace for one test."""
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Backbone]":
    """Return a function that loads a tiny backbone of a family, each once."""
    from support.tiny_models import load_tiny

    return cache(lambda family: load_tiny(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> "LocalEngine":
    """Load model and index of a small workspace in this process."""
    from support.small_endpoint import LocalEngine, write_endpoint

    return LocalEngine(write_endpoint(tmp_path_factory.mktemp("endpoint")))
