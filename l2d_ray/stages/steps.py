"""Work on a workspace that other jobs may change at the same time."""

from collections.abc import Callable
from typing import Any, TypeVar

from l2d_ray.errors import InputError

State = TypeVar("State")
Result = TypeVar("Result")


Run = Callable[[str, Callable[..., Any], list[tuple[Any, ...]]], list[Any]]
"""Runner of steps: a label, a function and the arguments of its calls become the results, in the same order."""


def on_newest(
    read: Callable[[], State], work: Callable[[State], Result], key: Callable[[State], object] = lambda state: state
) -> Result:
    """Return the result of work on the state that `read` finds. States with the same `key` are the same.

    Work that fails starts again if another job has changed the state meanwhile. It may have come second to write the
    next record, or have read a file that was removed.
    """
    while True:
        state = read()
        try:
            return work(state)
        except (InputError, OSError):
            if key(read()) == key(state):
                raise
