"""Requests that arrive one by one, run side by side."""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
REMEMBERED = 5
"""Batches of about one size that the speed is known from."""


class LateError(Exception):
    """So much waits already, or what runs hangs, that an item could not be done in time."""


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
        self._done: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._per_batch = self._rate = 0.0
        """Seconds, and seconds for each of its size."""
        self.failed = 0
        """Batches that ended in an error which somebody waited for, one after the other, up to now."""

    async def __call__(self, item: T, within: float = math.inf) -> R:
        """The result of one item. An item whose caller is cancelled before its batch starts is not run.

        Raises LateError if it is not to be expected within so many seconds, for what runs and waits before it. What has
        run for longer than that already hangs, or may take as long again.
        """
        size = self._size(item)
        before = sum(size for _, size, future in self._waiting if not future.done())
        seconds = max(self._seconds_until(before + size), self.running_seconds())
        if (self._size_running or before) and seconds > within:
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

    def _seconds_until(self, size: int) -> float:
        """What the current batch and so much more take at the speed of the last batches; 0 before the first is done."""
        batches = (self._started is not None) + math.ceil(size / self._budget)
        return batches * self._per_batch + (self._size_running + size) * self._rate

    def _learn(self, size: int, seconds: float) -> None:
        """From a batch: what one costs, however small, and what its size adds, neither below 0.

        A line through the last ones (least squares), by the medians of each order of magnitude: one that stalled does
        not count, and large ones are known also after many small ones.
        """
        self._done[size.bit_length()].append((size, seconds))
        size_M, seconds_M = np.array([np.median(done, axis=0) for done in self._done.values()]).T
        through_zero = size_M @ seconds_M / max(size_M @ size_M, 1.0)
        variance = size_M.var()
        rate = np.mean((size_M - size_M.mean()) * seconds_M) / variance if variance else through_zero
        self._rate = float(np.clip(rate, 0.0, through_zero))
        self._per_batch = max(float(seconds_M.mean()) - self._rate * float(size_M.mean()), 0.0)

    async def _work(self) -> None:
        while batch := self._next():
            items, futures = [item for item, _, _ in batch], [future for _, _, future in batch]
            size = sum(size for _, size, _ in batch)
            started = time.monotonic()
            self._started, self._size_running = started, size
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)
            except Exception as error:
                self.failed += not all(future.done() for future in futures)
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            finally:
                self._started, self._size_running = None, 0
            for future, result in zip(futures, results, strict=True):
                if not future.done():
                    future.set_result(result)
            self.failed = 0
            self._learn(size, time.monotonic() - started)

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
