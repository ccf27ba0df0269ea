"""Dynamic batches, and the estimate of how long they take."""

import asyncio
import threading
import time

import pytest

from l2d_ray.serve import batching
from l2d_ray.serve.batching import LateError, TokenBatcher


class Machine:
    """A machine that doubles numbers, records its batches and waits for a gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        assert self.gate.wait(10)
        if -1 in items:
            raise ValueError("no")
        return [2 * item for item in items]


def batcher(machine: Machine, budget: int) -> TokenBatcher[int, int]:
    return TokenBatcher(machine.run, size=abs, budget=budget)


async def start(batch: TokenBatcher[int, int], *items: int) -> list[asyncio.Task[int]]:
    """Return tasks that wait for the results, in the order of the items."""
    tasks = [asyncio.create_task(batch(item)) for item in items]
    await asyncio.sleep(0.05)
    return tasks


def test_items_that_arrive_during_a_batch_form_the_next_ones_within_the_budget() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.gate.clear()
        batch = batcher(machine, 10)
        tasks = await start(batch, 1)
        tasks += await start(batch, 4, 6, 3, 50, 2)
        assert batch.running_seconds() > 0
        machine.gate.set()
        assert await asyncio.gather(*tasks) == [2, 8, 12, 6, 100, 4]
        assert machine.batches == [[1], [4, 6], [3], [50], [2]]  # an item above the budget runs alone
        assert batch.running_seconds() == 0

    asyncio.run(scenario())


def test_an_error_reaches_only_its_batch() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.gate.clear()
        batch = batcher(machine, 2)
        tasks = await start(batch, 2, -1, 1, 2)
        machine.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert (results[0], results[3]) == (4, 4)
        assert all(isinstance(result, ValueError) for result in results[1:3])
        assert await batch(1) == 2

    asyncio.run(scenario())


def test_an_item_whose_caller_left_is_not_run() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.gate.clear()
        batch = batcher(machine, 10)
        (first,) = await start(batch, 1)
        gone, last = await start(batch, 2, 3)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        machine.gate.set()
        assert (await first, await last) == (2, 6)
        assert 2 not in [item for items in machine.batches for item in items]

    asyncio.run(scenario())


def test_an_item_that_cannot_be_done_in_time_is_refused_unless_it_is_alone() -> None:
    async def scenario() -> None:
        machine = Machine()
        batch = TokenBatcher(lambda items: time.sleep(sum(items) / 100) or machine.run(items), size=abs, budget=10)
        assert await batch(10) == 20  # from now on, a size of 10 is expected to take 0.1 s
        assert await batch(10, within=0.01) == 20  # alone
        tasks = await start(batch, 10, 9, 8)
        with pytest.raises(LateError):
            await batch(1, within=0.15)
        assert await batch(1, within=5) == 2
        assert await asyncio.gather(*tasks) == [20, 18, 16]

    asyncio.run(scenario())


@pytest.mark.parametrize("stalled", [None, 1, 9])
def test_the_fixed_cost_of_a_batch_is_not_counted_per_item(stalled: int | None) -> None:
    async def scenario() -> None:
        machine = Machine()
        stall = {stalled: 0.3}

        def run(items: list[int]) -> list[int]:
            time.sleep(0.02 + stall.pop(items[0], 0))
            return machine.run(items)

        batch = TokenBatcher(run, size=abs, budget=1000)
        for size in [*range(1, 10)] * 3:
            await batch(size)
        tasks = await start(batch, 1, *[400] * 8)  # at the rate of 9 per 0.02 s, these would take 7 s
        assert await batch(400, within=3) == 800
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_an_item_cannot_join_a_running_batch() -> None:
    async def scenario() -> None:
        machine = Machine()
        batch = TokenBatcher(lambda items: time.sleep(0.2) or machine.run(items), size=abs, budget=1000)
        for size in (1, 5, 9):
            await batch(size)
        tasks = await start(batch, 1)
        with pytest.raises(LateError):
            await batch(1, within=0.3)
        assert await batch(1, within=0.6) == 2
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_an_item_behind_a_batch_that_hangs_is_refused() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.gate.clear()
        batch = batcher(machine, 10)
        tasks = await start(batch, 1, 1)  # no batch is done yet, so there is no estimate
        with pytest.raises(LateError):
            await batch(1, within=0.02)
        assert machine.batches == [[1, 1]]
        machine.gate.set()
        assert await batch(1, within=5) == 2
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_the_estimate_follows_a_machine_that_becomes_slower() -> None:
    async def scenario() -> None:
        machine, seconds = Machine(), 0.001
        batch = TokenBatcher(lambda items: time.sleep(seconds * sum(items)) or machine.run(items), size=abs, budget=10)
        for size in (1, 5, 9, 10) * 5:
            await batch(size)
        seconds = 0.01
        for _ in range(3):
            await batch(10)
        tasks = await start(batch, 10, 10)
        with pytest.raises(LateError):
            await batch(10, within=0.1)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_items_whose_callers_left_are_not_counted() -> None:
    async def scenario() -> None:
        machine = Machine()
        batch = TokenBatcher(lambda items: time.sleep(sum(items) / 100) or machine.run(items), size=abs, budget=10)
        await batch(10)
        gone = await start(batch, *[10] * 9)
        for task in gone[1:]:
            task.cancel()
        await asyncio.sleep(0)
        assert await batch(5, within=0.25) == 10

    asyncio.run(scenario())


def test_a_large_batch_that_stalled_once_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "FORGET_SECONDS", 0.5)

    async def scenario() -> None:
        stalls = [2.0]

        def run(items: list[int]) -> list[int]:
            time.sleep(stalls.pop() if sum(items) > 1000 and stalls else sum(items) / 1e5)
            return items

        batch = TokenBatcher(run, size=abs, budget=2048)

        async def done() -> int:
            replies = await asyncio.gather(*(batch(100, within=0.8) for _ in range(20)), return_exceptions=True)
            return sum(reply == 100 for reply in replies)

        await batch(100)
        assert await done() == 20  # nothing is known of large batches yet
        assert await done() < 20
        await asyncio.sleep(0.6)
        await batch(100)
        assert await done() == 20

    asyncio.run(scenario())


@pytest.mark.parametrize("results", [[], [1, 2], StopIteration()])
def test_a_batch_without_one_result_for_each_item_fails(results: list[int] | StopIteration) -> None:
    def run(items: list[int]) -> list[int]:
        if isinstance(results, StopIteration):
            raise results
        return results

    async def scenario() -> None:
        batch = TokenBatcher(run, size=abs, budget=10)
        for failed in (1, 2):
            with pytest.raises(RuntimeError, match="batch"):
                await asyncio.wait_for(batch(1), 10)
            assert batch.failed == failed

    asyncio.run(scenario())
