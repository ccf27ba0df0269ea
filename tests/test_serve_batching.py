"""Batches that fill while the one before runs."""

import asyncio
import threading
import time

import pytest

from l2d_ray.serve.batching import LateError, TokenBatcher


class Machine:
    """Doubles numbers; notes its batches; waits for the gate."""

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
    """Tasks that wait for the results, in the order of the items."""
    tasks = [asyncio.create_task(batch(item)) for item in items]
    await asyncio.sleep(0.05)
    return tasks


def test_what_arrives_during_a_batch_is_the_next_one_up_to_the_budget() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.gate.clear()
        batch = batcher(machine, 10)
        tasks = await start(batch, 1)
        tasks += await start(batch, 4, 6, 3, 50, 2)
        assert batch.running_seconds() > 0
        machine.gate.set()
        assert await asyncio.gather(*tasks) == [2, 8, 12, 6, 100, 4]
        assert machine.batches == [[1], [4, 6], [3], [50], [2]]  # in order; what is larger than the budget runs alone
        assert batch.running_seconds() == 0

    asyncio.run(scenario())


def test_an_error_reaches_its_batch_only() -> None:
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


def test_who_left_is_not_run() -> None:
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


def test_what_cannot_be_done_in_time_is_refused_unless_nothing_is_before_it() -> None:
    async def scenario() -> None:
        machine = Machine()
        batch = TokenBatcher(lambda items: time.sleep(sum(items) / 100) or machine.run(items), size=abs, budget=10)
        assert await batch(10) == 20  # so it is known that ten take a tenth of a second
        assert await batch(10, within=0.01) == 20  # nothing is before it
        tasks = await start(batch, 10, 9, 8)
        with pytest.raises(LateError):
            await batch(1, within=0.15)
        assert await batch(1, within=5) == 2
        assert await asyncio.gather(*tasks) == [20, 18, 16]

    asyncio.run(scenario())


@pytest.mark.parametrize("stalled", [None, 1, 9])
def test_what_a_batch_costs_is_not_taken_for_slowness(stalled: int | None) -> None:
    async def scenario() -> None:
        machine = Machine()
        stall = {stalled: 0.3}

        def run(items: list[int]) -> list[int]:
            time.sleep(0.02 + stall.pop(items[0], 0))
            return machine.run(items)

        batch = TokenBatcher(run, size=abs, budget=1000)
        for size in [*range(1, 10)] * 3:
            await batch(size)
        tasks = await start(batch, 1, *[400] * 8)  # at 9 for 0.02 s it would be 7 s
        assert await batch(400, within=3) == 800
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_batch_that_runs_is_not_shared() -> None:
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


def test_nobody_waits_for_what_hangs() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.gate.clear()
        batch = batcher(machine, 10)
        tasks = await start(batch, 1, 1)  # no batch was done yet: how long one takes is not known
        with pytest.raises(LateError):
            await batch(1, within=0.02)
        assert machine.batches == [[1, 1]]
        machine.gate.set()
        assert await batch(1, within=5) == 2
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_machine_that_has_become_slower_is_noticed() -> None:
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


def test_what_nobody_waits_for_makes_nobody_late() -> None:
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
