"""Tables in Ray's object store, and functions that run on them: one task a block, small results to the driver."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from l2d_ray.distributed.progress import Progress


class Blocks:
    """An ordered list of references to tables. Ray spills tables that do not fit into memory to disk."""

    def __init__(self, refs: Sequence[Any]):
        self.refs = list(refs)

    def map(self, function: Callable[..., pa.Table], *shared: Any, each: Sequence[Any] | None = None) -> "Blocks":
        """Return the blocks of `function(block, *shared)`, or `function(block, each[b], *shared)`, without waiting."""
        return Blocks(self._submit(function, shared, each))

    def ask(
        self, label: str, function: Callable[..., Any], *shared: Any, each: Sequence[Any] | None = None
    ) -> list[Any]:
        """Return the small results of a function called as in `map`, in the order of the blocks."""
        results = dict(self.stream(label, function, *shared, each=each))
        return [results[number] for number in range(len(self.refs))]

    def stream(
        self, label: str, function: Callable[..., Any], *shared: Any, each: Sequence[Any] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (block number, result) as the tasks end, so that a sum of them holds one at a time."""
        waiting = {ref: number for number, ref in enumerate(self._submit(function, shared, each))}
        with Progress(len(waiting), label, "blocks") as bar:
            while waiting:
                for ref in ray.wait(list(waiting))[0]:
                    yield waiting.pop(ref), ray.get(ref)
                    bar.advance()

    def _submit(self, function: Callable[..., Any], shared: Sequence[Any], each: Sequence[Any] | None) -> list[Any]:
        task = ray.remote(function)
        if each is None:
            return [task.remote(ref, *shared) for ref in self.refs]
        return [task.remote(ref, value, *shared) for ref, value in zip(self.refs, each, strict=True)]
