"""Exchanges with the shards of an index: generators of requests that do not know where the shards are.

An exchange yields a `Request`, is sent the answers of all shards, and finally returns its result. `run` answers from
shards in this process. A server may send the requests to replicas in parallel instead.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A function to call on every shard. The answers are sent back as a list in the order of the shards."""

    function: Callable[..., Any]
    """`function(shard, *arguments)`, at the top level of a module so that it pickles by reference."""
    arguments: tuple[Any, ...] = ()
    """Arguments that are the same for every shard."""
    per_shard: Sequence[Any] | None = None
    """One more argument for each shard, passed last."""

    def answer(self, shards: Sequence[Any]) -> list[Any]:
        """Call the function on each shard, one after the other."""
        if self.per_shard is None:
            return [self.function(shard, *self.arguments) for shard in shards]
        pairs = zip(shards, self.per_shard, strict=True)
        return [self.function(shard, *self.arguments, argument) for shard, argument in pairs]

    def split(self, sizes: Iterable[int]) -> "list[Request]":
        """Return one request for each group of consecutive shards, given the number of shards in each group."""
        if self.per_shard is None:
            return [self for _ in sizes]
        rest = iter(self.per_shard)
        return [replace(self, per_shard=list(islice(rest, size))) for size in sizes]


Exchange = Generator[Request, list[Any], T]


def drive(exchange: Exchange[T], send: Callable[[Request], list[Any]]) -> T:
    """Return the result of an exchange, each request of which is answered by `send`."""
    answers: Any = None  # what starts a generator
    while True:
        try:
            request = exchange.send(answers)
        except StopIteration as done:
            result: T = done.value
            return result
        answers = send(request)


def run(exchange: Exchange[T], shards: Sequence[Any]) -> T:
    """Return the result of an exchange with shards in this process."""
    return drive(exchange, lambda request: request.answer(shards))


def partition(shards: int, parts: int) -> list[range]:
    """Return the shard numbers of each part, as even as possible; a part may be empty."""
    bounds = np.linspace(0, shards, parts + 1).astype(int).tolist()
    return [range(start, stop) for start, stop in pairwise(bounds)]
