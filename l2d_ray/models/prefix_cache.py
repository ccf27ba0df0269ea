"""A cache of attention keys and values, for users who return with a longer history.

An entry is the beginning of a prompt, up to the end of its last item, with every layer's keys and values. The longest
entry that a new prompt begins with does not run again (`core/packing.py`, `skip_known`). A longer history replaces the
shorter one it extends, so a user has one entry. The least recently used entries are evicted.
"""

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2d_ray.core.arrays import IntArray


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
        self._entries: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def lookup(self, prompt: NDArray[np.int32], boundaries: IntArray) -> list[Tensor]:
        """Return each layer's keys and values [tokens, 2 H, D] of the longest cached beginning; an empty list if none.

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

    def keep(self, prompt: NDArray[np.int32], boundaries: IntArray, layers: list[Tensor], rows: IntArray) -> None:
        """Cache the prompt up to its last boundary, unless it is cached already or larger than the whole cache.

        `rows` are the indices of the prompt's tokens in the keys and values of each layer.
        """
        if not boundaries.size:
            return
        *shorter, last = boundaries
        key = prompt[:last].tobytes()
        size = int(last) * sum(layer[0].nbytes for layer in layers)
        if key in self._entries or size > self.max_bytes:
            return
        for boundary in shorter:
            self._drop(prompt[:boundary].tobytes())
        while self.bytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        index = torch.from_numpy(rows[:last]).to(layers[0].device)
        self._entries[key] = [layer.index_select(0, index) for layer in layers]
        self.bytes += size

    def _drop(self, key: bytes) -> None:
        self.bytes -= sum(layer.nbytes for layer in self._entries.pop(key, []))
