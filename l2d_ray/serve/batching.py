"""Requests that arrive one by one, run side by side."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
REMEMBERED = 64
"""Batches that the speed is known from."""


class LateError(Exception):
    """So much waits already that an item could not be done in time."""


class TokenBatcher(Generic[T, R]):
    """Runs all that waits at once, up to a budget, in a thread; what arrives meanwhile is the next batch.

    First come, first served. A lone request starts at once, and under load batches fill by themselves: there is no time
    to wait for company. What cannot be done in time is refused at once: to run it would only make others late, too,
    until nothing is in time any more. (Ray Serve's `serve.batch` closes a batch after a fixed wait even while the one
    before it is running, sends what does not fit to the end of the queue and refuses an item above the budget.)
    """

    def __init__(self, run: Callable[[list[T]], list[R]], size: Callable[[T], int], budget: int) -> None:
        """`run` is called in one thread, with items whose sizes add up to `budget` at most, or with a single item."""
        self._run, self._size, self._budget = run, size, budget
        self._waiting: deque[tuple[T, int, asyncio.Future[R]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._working: asyncio.Task[None] | None = None
        self._started: float | None = None
        self._size_running = 0
        self._done: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    async def __call__(self, item: T, within: float = math.inf) -> R:
        """The result of one item. An item whose caller is cancelled before its batch starts is not run.

        Raises LateError if it is not to be expected within so many seconds, for what runs and waits before it.
        """
        size = self._size(item)
        before = self._size_running + sum(size for _, size, future in self._waiting if not future.done())
        if before and self._seconds_for(before + size) > within:
            raise LateError
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, size, result))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await result

    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return len(self._waiting)

    def running_seconds(self) -> float:
        """For how long the current batch has been running; 0 between batches."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def _seconds_for(self, size: int) -> float:
        """What that takes at the speed of the last batches; 0 before the first.

        A line through them (least squares): what a batch costs, however small, and what its size adds, neither below 0.
        """
        if not self._done:
            return 0.0
        size_N, seconds_N = np.array(self._done).T
        through_zero = size_N @ seconds_N / max(size_N @ size_N, 1.0)
        variance = size_N.var()
        rate = np.mean((size_N - size_N.mean()) * seconds_N) / variance if variance else through_zero
        rate = float(np.clip(rate, 0.0, through_zero))
        per_batch = float(seconds_N.mean()) - rate * float(size_N.mean())
        return math.ceil(size / self._budget) * max(per_batch, 0.0) + size * rate

    async def _work(self) -> None:
        while batch := self._next():
            items, futures = [item for item, _, _ in batch], [future for _, _, future in batch]
            self._started, self._size_running = time.monotonic(), sum(size for _, size, _ in batch)
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            finally:
                self._done.append((self._size_running, time.monotonic() - self._started))
                self._started, self._size_running = None, 0
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _next(self) -> list[tuple[T, int, asyncio.Future[R]]]:
        batch: list[tuple[T, int, asyncio.Future[R]]] = []
        total = 0
        while self._waiting:
            item, size, future = self._waiting[0]
            if not future.done():
                total += size
                if batch and total > self._budget:
                    break
                batch.append((item, size, future))
            self._waiting.popleft()
        return batch
