"""A warning when other programs on this machine take the processor time that Ray's workers need."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self

import psutil

from l2d_ray.distributed.ray_settings import NICENESS
from l2d_ray.distributed.screen import say

SECONDS = 30.0
"""Length of one measurement."""
FULL, TAKEN = 0.9, 0.25
"""Shares of the processor: all programs use the first where it is full, others the second where they matter."""


@contextmanager
def warn_if_busy() -> Iterator[None]:
    """Print one line on the user's stderr when other programs have slowed this job down for 30 seconds.

    The job is this process with its descendants: the Ray that it started on this machine, and that Ray's workers.
    Prints nothing where the user's environment sets the niceness of these workers.
    """
    if NICENESS in os.environ:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=[ended], daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event) -> None:
    before, cores = Usage.now(), psutil.cpu_count() or 1
    while not ended.wait(SECONDS):
        now = Usage.now()
        cores_used, before = now.since(before), now
        if cores_used and is_busy(*cores_used, cores):
            ours, others = cores_used
            say(
                f"this machine is busy: other programs use {others:.1f} of its {cores} cores and this job gets"
                f" {ours:.1f}; end them, and it gets faster"
            )
            return


def is_busy(ours: float, others: float, cores: int) -> bool:
    """Return whether other programs slow the job down, from the cores that it and they use."""
    return ours + others >= FULL * cores and others >= TAKEN * cores


@dataclass(frozen=True)
class Usage:
    """Processor time used so far, in seconds."""

    time: float
    """When it was measured, by a monotonic clock."""
    job: dict[int, float]
    """By each process of this job, by its id."""
    everyone: float
    """By all programs of this machine."""

    @classmethod
    def now(cls) -> Self:
        """Measure the usage at this moment."""
        processes, this = {}, psutil.Process()
        for process in [this, *this.children(recursive=True)]:
            with suppress(psutil.Error):  # it has ended
                times = process.cpu_times()
                processes[process.pid] = times.user + times.system
        everyone = psutil.cpu_times()
        return cls(time.monotonic(), processes, sum(everyone) - everyone.idle - getattr(everyone, "iowait", 0.0))

    def since(self, before: "Usage") -> tuple[float, float] | None:
        """Return the cores that the job and other programs have used since then.

        None if a process of the job has ended, because its time can no longer be told from that of other programs.
        """
        if not before.job.keys() <= self.job.keys():
            return None
        seconds = self.time - before.time
        ours = sum(self.job.values()) - sum(before.job.values())
        return ours / seconds, (self.everyone - before.everyone - ours) / seconds
