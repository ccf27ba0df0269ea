"""Work ahead of its use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(values: Iterator[T]) -> Iterator[T]:
    """Yield the values, none of which is None; make the next one in a thread while the caller uses the current one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, values, None)
        while (value := coming.result()) is not None:
            coming = pool.submit(next, values, None)
            yield value
