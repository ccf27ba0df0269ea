"""A cache of attention keys and values, for users who return with a longer history.

An entry is the beginning of a prompt, up to the end of its last item, with every layer's keys and values. The longest
entry that a new prompt begins with does not run again (`core/packing.py`, `skip_known`). A longer history replaces the
shorter one it extends, so a user has one entry. It consists of segments: the longer history takes over those of the
shorter one and adds one, so that hardly anything is copied. The least recently used entries are evicted.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2d_ray.core.arrays import IntArray

Segment = list[Tensor]
"""Each layer's keys and values [tokens, 2 H, D] of adjacent tokens."""
MAX_SEGMENTS = 8
"""Segments of an entry; with one more, they become one."""


class PrefixCache:
    """Keys and values of prompt beginnings, at most `max_bytes` of them, on the model's device. Not thread-safe.

    The `boundaries` of a prompt are the lengths, ascending, at which a cached beginning of it may end: where its items
    end.
    """

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache. Use it with one model only: entries do not record their model."""
        self.max_bytes = max_bytes
        self.bytes = 0
        """Size of the entries."""
        self.hits = 0
        """Number of prompts with a cached beginning."""
        self.misses = 0
        """Number of prompts without one."""
        self.tokens_saved = 0
        """Number of tokens in the beginnings found."""
        self._entries: OrderedDict[bytes, list[Segment]] = OrderedDict()

    def lookup(self, prompt: NDArray[np.int32], boundaries: IntArray) -> list[Segment]:
        """Return the segments of the longest cached beginning, in the order of its tokens; an empty list if none.

        The tensors stay valid when the entry is evicted.
        """
        found = self.longest(prompt, boundaries)
        if not found:
            self.misses += 1
            return []
        key = prompt[:found].tobytes()
        self._entries.move_to_end(key)
        self.hits += 1
        self.tokens_saved += found
        return self._entries[key]

    def longest(self, prompt: NDArray[np.int32], boundaries: IntArray) -> int:
        """Return the length of the longest cached beginning; 0 if none. Safe to call from other threads."""
        return next((int(end) for end in boundaries[::-1] if prompt[:end].tobytes() in self._entries), 0)

    def keep(
        self,
        prompt: NDArray[np.int32],
        boundaries: IntArray,
        found: list[Segment],
        keys: IntArray,
        read: Callable[[IntArray], Segment],
    ) -> None:
        """Cache the prompt up to its last boundary, unless it is cached already or larger than the whole cache.

        `found` is what `lookup` returned. `read` copies the keys and values of some of the prompt's `keys`, of which
        there is one for each token.
        """
        if not boundaries.size:
            return
        *shorter, last = boundaries
        key = prompt[:last].tobytes()
        if key in self._entries:
            return
        new = keys[length(found) : last]  # none, if another prompt of the batch has evicted what was found
        entry = [*found, read(new)] if new.size else found
        if len(entry) > MAX_SEGMENTS:
            entry = [[torch.cat(tensors) for tensors in zip(*entry, strict=True)]]
        size = _bytes(entry)
        if size > self.max_bytes:
            return
        for boundary in shorter:
            self._drop(prompt[:boundary].tobytes())
        while self.bytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = entry
        self.bytes += size

    def _drop(self, key: bytes) -> None:
        self.bytes -= _bytes(self._entries.pop(key, []))


def length(entry: list[Segment]) -> int:
    """Return the number of tokens of an entry."""
    return sum(len(segment[0]) for segment in entry)


def _bytes(entry: list[Segment]) -> int:
    return sum(layer.nbytes for segment in entry for layer in segment)
