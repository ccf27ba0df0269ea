"""The environment of a Ray on this machine, as its workers find it."""

import os
from pathlib import Path

import pytest
import ray

from l2d_ray.distributed.ray_settings import LOCAL_VARIABLES, NICENESS, set_local_variables


def test_the_environment_of_the_user_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {NICENESS: "15"})
    set_local_variables()
    assert os.environ == LOCAL_VARIABLES | {NICENESS: "15"}


@pytest.mark.ray
def test_workers_run_at_normal_priority_with_threads_that_sleep_and_jemalloc(ray_session: None) -> None:
    def facts() -> tuple[int, str | None, bool]:
        return os.nice(0), os.environ.get("OMP_WAIT_POLICY"), "jemalloc" in Path("/proc/self/maps").read_text()

    assert ray.get(ray.remote(facts).remote()) == (0, "PASSIVE", True)
