"""Tables in Ray's object store, and functions that run beside them: one task a block, small answers to the driver."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from l2d_ray.distributed.progress import Progress


class Blocks:
    """An ordered list of references to tables; Ray spills to disk those that do not fit into memory."""

    def __init__(self, refs: Sequence[Any]):
        self.refs = list(refs)

    def map(self, function: Callable[..., pa.Table], *shared: Any, each: Sequence[Any] | None = None) -> "Blocks":
        """The blocks that `function(block, *shared)` returns, or `function(block, each[b], *shared)`; does not wait."""
        return Blocks(self._submit(function, shared, each))

    def ask(
        self, label: str, function: Callable[..., Any], *shared: Any, each: Sequence[Any] | None = None
    ) -> list[Any]:
        """The small answers of a function called as in `map`, in the order of the blocks."""
        answers = dict(self.stream(label, function, *shared, each=each))
        return [answers[number] for number in range(len(self.refs))]

    def stream(
        self, label: str, function: Callable[..., Any], *shared: Any, each: Sequence[Any] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(block number, answer) as they come, so that a sum over them needs to hold only one."""
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
        return [task.remote(ref, own, *shared) for ref, own in zip(self.refs, each, strict=True)]
