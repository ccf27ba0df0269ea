"""Passes of Ray Data that survive the loss of nodes."""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from ray.exceptions import RayActorError

logger = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
Piece = TypeVar("Piece")
Result = TypeVar("Result")

FRUITLESS = 3
"""Rounds in a row that may finish nothing."""


def in_rounds(
    pieces: Mapping[Key, Piece], run: Callable[[list[Piece]], Iterator[tuple[Iterable[Key], Result]]]
) -> Iterator[Result]:
    """Yield the results of `run` over pieces of work. It gives each result with the keys of the pieces in it.

    After the loss of a node, Ray Data may give up on a task whose end it cannot know. Then the remaining pieces start
    again, but not for ever: a piece that kills all its workers must end the job. A cloud that takes nodes back is no
    reason to end it.
    """
    missing, fruitless = dict(pieces), 0
    while missing:
        before = len(missing)
        try:
            for keys, result in run(list(missing.values())):
                for key in keys:
                    del missing[key]
                yield result
        except RayActorError as error:
            fruitless = 0 if len(missing) < before or error.preempted else fruitless + 1
            if fruitless == FRUITLESS:
                raise
            logger.warning("a worker was lost; %d of %d pieces start again: %s", len(missing), len(pieces), error)
