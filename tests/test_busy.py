import subprocess
import sys
import time

import psutil
import pytest

from l2d_ray.distributed import busy
from l2d_ray.distributed.busy import Usage, is_busy, warn_if_busy
from l2d_ray.distributed.ray_settings import NICENESS

START_BUSY = """
import subprocess, sys
for _ in range(int(sys.argv[1])):
    print(subprocess.Popen([sys.executable, "-c", "while True: pass"], stdout=-3, stderr=-3).pid)
"""
"""Start busy processes, print their ids and end: they are children of this test no longer."""


@pytest.mark.parametrize(("ours", "others", "slowed"), [(3.8, 0.2, False), (0.4, 1.6, False), (0.4, 3.6, True)])
def test_a_job_is_slowed_down_where_others_fill_the_machine(ours: float, others: float, slowed: bool) -> None:
    assert is_busy(ours, others, cores=4) == slowed


def test_the_time_of_a_process_that_ended_is_not_taken_for_that_of_others() -> None:
    before = Usage(0.0, {1: 5.0, 2: 50.0}, 100.0)
    assert Usage(10.0, {1: 10.0, 2: 55.0, 3: 2.0}, 116.0).since(before) == pytest.approx((1.2, 0.4))
    assert Usage(10.0, {1: 10.0, 3: 2.0}, 116.0).since(before) is None


@pytest.mark.parametrize("known", [False, True])
def test_other_programs_are_reported_unless_the_user_set_the_niceness(
    known: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(NICENESS, "0")
    if not known:
        monkeypatch.delenv(NICENESS)
    monkeypatch.setattr(busy, "SECONDS", 1.0)
    start = [sys.executable, "-c", START_BUSY, str(psutil.cpu_count())]
    found = subprocess.run(start, capture_output=True, text=True, check=True).stdout.split()
    try:
        with warn_if_busy():
            time.sleep(3.5)
    finally:
        for pid in found:
            psutil.Process(int(pid)).kill()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (not known)
    assert all(line.startswith("this machine is busy: other programs use ") for line in lines)
