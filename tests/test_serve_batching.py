"""Batches that fill while the one before runs."""

import asyncio
import threading

import pytest

from l2d_ray.serve.batching import TokenBatcher


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
