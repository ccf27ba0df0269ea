"""Wall-clock timing of work on a CPU or a GPU."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Call `run`; return its duration in seconds, including queued GPU work, and its result."""
    started = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result
