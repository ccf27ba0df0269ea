"""Dynamic batching: run items that arrive one by one in batches, within a token budget."""

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
SPEED_SAMPLES = 5
"""Recent batches per order of magnitude of size, from which the speed is estimated."""
FORGET_SECONDS = 60.0
"""Seconds without a batch of an order of magnitude after which its batches count no more."""


class LateError(Exception):
    """An item cannot be finished in time, because of the items before it or because the running batch hangs."""


class TokenBatcher(Generic[T, R]):
    """A queue whose items run in a thread, in batches: all waiting items at once, up to a budget.

    First come, first served. An item that arrives while a batch runs waits for the next one. So a lone item starts at
    once, and under load the batches fill without a waiting time. An item that cannot be finished in time is refused at
    once: running it would only make others late, until every item is late. (Ray Serve's `serve.batch` closes a batch
    after a fixed wait, even while the previous one runs. It moves items that do not fit to the end of the queue, and
    refuses items above the budget.)
    """

    def __init__(self, run: Callable[[list[T]], list[R]], size: Callable[[T], int], budget: int) -> None:
        """Call `run` in one thread, with items whose sizes add up to at most `budget`, or with a single larger item."""
        self._run, self._size, self._budget = run, size, budget
        self._waiting: deque[tuple[T, int, asyncio.Future[R]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._working: asyncio.Task[None] | None = None
        self._started: float | None = None
        self._size_running = 0
        self._done: dict[int, deque[tuple[int, float, float]]] = defaultdict(lambda: deque(maxlen=SPEED_SAMPLES))
        """Size, seconds and time of the recent batches of each order of magnitude."""
        self._per_batch = self._rate = 0.0
        """Estimated seconds per batch, and per unit of size."""
        self.failed = 0
        """Batches that failed since the last success. A batch whose callers have all left does not count."""

    async def __call__(self, item: T, within: float = math.inf) -> R:
        """Return the result of one item. An item whose caller is cancelled before its batch starts is not run.

        Raises LateError if other items are before it and the result is not expected within `within` seconds. A batch
        that has been running for longer than that is expected to take as long again.
        """
        size = self._size(item)
        size_before = sum(size for _, size, future in self._waiting if not future.done())
        seconds = max(self._seconds_for(size_before + size), self.running_seconds())
        if (self._size_running or size_before) and seconds > within:
            raise LateError
        result: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, size, result))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await result

    def waiting(self) -> int:
        """Return the number of items that are not in a batch yet."""
        return len(self._waiting)

    def running_seconds(self) -> float:
        """Return how long the current batch has been running; 0 between batches."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def _seconds_for(self, size: int) -> float:
        """Estimate the seconds for the current batch and `size` more; 0 before the first batch is done."""
        batches = (self._started is not None) + math.ceil(size / self._budget)
        return batches * self._per_batch + (self._size_running + size) * self._rate

    def _update_speed(self, size: int, seconds: float) -> None:
        """Estimate the fixed seconds per batch and the seconds per unit of size, neither below 0.

        Fits a line (least squares) to the medians of recent batches of each order of magnitude of size. The medians
        ignore a batch that stalled. The orders of magnitude keep large batches in view after many small ones, but not
        for ever: a single one that stalled would have all large ones refused.
        """
        now = time.monotonic()
        self._done[size.bit_length()].append((size, seconds, now))
        for old in [old for old, done in self._done.items() if now - done[-1][2] > FORGET_SECONDS]:
            del self._done[old]
        size_M, seconds_M, _ = np.array([np.median(done, axis=0) for done in self._done.values()]).T
        through_zero = size_M @ seconds_M / max(size_M @ size_M, 1.0)
        variance = size_M.var()
        rate = np.mean((size_M - size_M.mean()) * seconds_M) / variance if variance else through_zero
        self._rate = float(np.clip(rate, 0.0, through_zero))
        self._per_batch = max(float(seconds_M.mean()) - self._rate * float(size_M.mean()), 0.0)

    async def _work(self) -> None:
        while batch := self._next_batch():
            items, futures = [item for item, _, _ in batch], [future for _, _, future in batch]
            size = sum(size for _, size, _ in batch)
            started = time.monotonic()
            self._started, self._size_running = started, size
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._checked, items)
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
            self._update_speed(size, time.monotonic() - started)

    def _checked(self, items: list[T]) -> list[R]:
        """Run items. Raises RuntimeError if there is not one result for each."""
        try:
            results = self._run(items)
        except StopIteration as error:  # which no future takes
            raise RuntimeError("the batch raised StopIteration") from error
        if len(results) != len(items):
            raise RuntimeError(f"a batch of {len(items)} items has {len(results)} results")
        return results

    def _next_batch(self) -> list[tuple[T, int, asyncio.Future[R]]]:
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
