"""Keys and values of histories that were run, for when their users return with one item more.

An entry is a prompt's beginning, up to the end of its last item, with what every layer made of it. The longest entry
that a new prompt begins with need not run again (`core/packing.py`, `skip_known`). A history that has grown replaces
what it has grown from, so that a user has one entry; those not used for longest make room.
"""

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2d_ray.core.packing import IntArray


class PrefixCache:
    """Prompts' beginnings in at most `max_bytes` of keys and values, on the model's device. For one thread at a time.

    The `boundaries` of a prompt are the lengths, in ascending order, at which a beginning of it may end: where its
    items end.
    """

    def __init__(self, max_bytes: int) -> None:
        """An empty cache. It is for one model: an entry does not say whose it is."""
        self.max_bytes = max_bytes
        self.bytes = 0
        """Size of what it holds now."""
        self.hits = 0
        """Prompts whose beginning was found."""
        self.misses = 0
        """Prompts of which none was."""
        self.tokens_saved = 0
        """Tokens of the beginnings found."""
        self._entries: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def lookup(self, prompt: NDArray[np.int32], boundaries: IntArray) -> list[Tensor]:
        """The keys and values [tokens, 2 H, D] of each layer for the longest beginning it has; no layers if none.

        They stay valid when the entry is evicted.
        """
        for boundary in boundaries[::-1]:
            key = prompt[:boundary].tobytes()
            if key in self._entries:
                self._entries.move_to_end(key)
                self.hits += 1
                self.tokens_saved += int(boundary)
                return self._entries[key]
        self.misses += 1
        return []

    def keep(self, prompt: NDArray[np.int32], boundaries: IntArray, layers: list[Tensor], rows: IntArray) -> None:
        """Copy the prompt up to its last boundary, unless it is there or would not fit alone.

        `rows` says where the prompt's tokens are in the keys and values of each layer.
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
