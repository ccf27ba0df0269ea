import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.small_endpoint import LocalEngine

    from l2d_ray.models.backbone import Backbone


def pytest_configure() -> None:
    """Give this session's Ray its own token, before any module imports Ray, which reads it then.

    And its workers as much of the processor as the tests beside them: Ray starts them at niceness 15. One thread each:
    where more threads run than there are cores, those of one product of matrices wait for each other.
    """
    token = secrets.token_hex(32)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this session's own, with more logical CPUs than a small machine has."""
    import ray

    from l2d_ray.distributed.job import quiet

    # Ray ends surplus workers that idle for a second; to start them again costs more than most tests do.
    # Workers import recommenders that tests add from here; Ray gives them only the folder of the command.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    keep = {"idle_worker_killing_time_threshold_ms": 600_000}
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config=keep)
    quiet()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def dataset(users: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a dataset of so many `users`, which the module names, and a model."""
    from support.small_workspace import config_of, write_dataset

    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, users)
    config_of(folder)
    return folder


@pytest.fixture
def folder(dataset: Path, tmp_path: Path) -> Path:
    """A workspace of one's own."""
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Backbone]":
    """A tiny backbone of a family; each is made once."""
    from support.tiny_models import load_tiny

    return cache(lambda family: load_tiny(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> "LocalEngine":
    """The model and the index of a workspace that can be served, in this process."""
    from support.small_endpoint import LocalEngine, write_endpoint

    return LocalEngine(write_endpoint(tmp_path_factory.mktemp("endpoint")))
