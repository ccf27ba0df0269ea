import os
import secrets
from collections.abc import Iterator

import pytest


def pytest_configure() -> None:
    """Give this session's Ray its own token, before any module imports Ray, which reads it then."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this session's own, with more logical CPUs than a small machine has."""
    import ray

    from l2d_ray.distributed.job import quiet

    # Ray ends surplus workers that idle for a second; to start them again costs more than most tests do.
    keep = {"idle_worker_killing_time_threshold_ms": 600_000}
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config=keep)
    quiet()
    yield
    ray.shutdown()
