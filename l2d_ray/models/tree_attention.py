"""Attention over a prefix forest, registered as an attention implementation of transformers.

`transformers.AttentionInterface` passes every layer's queries, keys and values to the function registered here, in any
architecture. The visible keys follow from the chunk's `starts` and `ends` (`core/packing.py`): query q attends to key k
exactly when `starts[k] <= q < ends[k]`.

On a CPU, queries are processed in blocks. A block reads only the keys that one of its queries attends to. These are
few, so the work grows with the tree and not with the square of the chunk. On a GPU the same rule is a FlexAttention
block mask (`flex_attention.py`).

Shapes: C tokens of a chunk, P tokens of its path, H heads, D size of a head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.packing import Chunk

NOT_SUPPORTED = {"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"}
"""Arguments that some architectures pass and that would change the result if ignored."""
QUERIES_PER_BLOCK = 64
"""Largest block. Smaller blocks read fewer keys but need more calls.

On one AVX-512 machine 32 was slower, and 128 as fast within noise.
"""
PAIRS_PER_CALL = 1000
"""Cost of one more attention call, in pairs of query and key. A block ends early if that saves more pairs."""


Part = tuple[int, slice | Tensor]
"""Rows of one of several tensors: the number of the tensor, and its rows."""


class ForestState:
    """The state of a forest between the layers' calls: the current chunk, and the keys and values of its path.

    Every layer has its keys and values in several *sources* [tokens, 2 H, D]. Those of known beginnings are not joined
    to those of the first chunk: a block of queries copies the few that it reads, and nothing else is copied.

    One object serves one forest.
    """

    def __init__(self, device: torch.device, known: Sequence[Sequence[Tensor]] = ()) -> None:
        """Prepare for the first chunk.

        `known[n]` holds each layer's keys and values [tokens, 2 H, D] of a part of the known tokens. `forest.known`
        indexes their concatenation.
        """
        self._device = device
        self._known = zip(*known, strict=True)
        self._sizes = [len(layers[0]) for layers in known]
        self._rows = np.arange(sum(self._sizes))
        """[P + C] row of each key of the current chunk in the concatenation of the sources."""
        self._path: list[Part] | None = None
        """The path's parts of the sources of the chunk before, to be joined with the chunk; None if they stay apart."""
        self._before: dict[nn.Module, list[Tensor]] = {}
        """Sources of the chunk before, until their layer has run."""
        self._sources: dict[nn.Module, list[Tensor]] = {}
        self.blocks: list[tuple[slice, list[Part], Tensor]] = []
        """Each block's queries, the parts of the sources that are its keys, and its mask."""
        self.block_mask: Any = None

    def enter(self, chunk: Chunk, dtype: torch.dtype) -> None:
        """Prepare for the forward pass of the next chunk."""
        path, length, on_gpu = self._rows[chunk.path], len(chunk.tokens), self._device.type == "cuda"
        self._before, self._sources = self._sources, {}
        if self._before or on_gpu:
            self._path = self._parts(path)
            self._rows, self._sizes = np.arange(path.size + length), [path.size + length]
        else:
            self._rows = np.concatenate([path, sum(self._sizes) + np.arange(length)])
            self._sizes = [*self._sizes, length]
        if on_gpu:
            from l2d_ray.models import flex_attention

            self.block_mask = flex_attention.block_mask(chunk, self._device)
        else:
            self.blocks = [
                (queries, self._parts(self._rows[keys]), mask) for queries, keys, mask in _blocks(chunk, dtype)
            ]

    def run(self, model: Any, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """Run the next chunk through a model that `use_in` prepared; return its last hidden states [C, hidden size]."""
        self.enter(chunk, dtype)
        states: Tensor = model(
            input_ids=torch.from_numpy(chunk.tokens)[None].to(self._device),
            position_ids=torch.from_numpy(chunk.positions)[None].to(self._device),
            use_cache=False,
            forest=self,
        ).last_hidden_state[0]
        return states

    def _parts(self, rows: IntArray) -> list[Part]:
        """Convert rows of the concatenation of the sources to parts. Adjacent rows of a source are one part."""
        bounds = np.cumsum([0, *self._sizes])
        numbers = np.searchsorted(bounds, rows, side="right") - 1
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        pairs = zip(np.split(numbers, cuts), np.split(rows - bounds[numbers], cuts), strict=True)
        return [(int(number[0]), self._slice_or_indices(own)) for number, own in pairs if own.size]

    def _slice_or_indices(self, rows: IntArray) -> slice | Tensor:
        adjacent = (np.diff(rows) == 1).all()
        return slice(int(rows[0]), int(rows[-1]) + 1) if adjacent else torch.from_numpy(rows).to(self._device)

    def keys_and_values(self, keys: IntArray) -> list[Tensor]:
        """Return each layer's keys and values [keys, 2 H, D] after the forward pass of the current chunk, as copies.

        `keys` are indices into the chunk's keys.
        """
        parts = self._parts(self._rows[keys])
        return [torch.cat(_pieces(sources, parts)) for sources in self._sources.values()]

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> list[Tensor]:
        """Add the chunk's keys and values [1, H, C, D] to the sources of a layer, and return these.

        They are kept for the next chunk. A token's keys and values are adjacent in memory, as the projections leave
        them, so that one copy moves both.
        """
        own = torch.cat([key.transpose(1, 2)[0], value.transpose(1, 2)[0]], dim=1)
        before = self._before.pop(layer) if layer in self._before else list(next(self._known, ()))
        sources = [*before, own] if self._path is None else [_join([*_pieces(before, self._path), own])]
        # Detached, because training has one chunk, and gradient checkpointing could otherwise not free these tensors.
        self._sources[layer] = [source.detach() for source in sources]
        return sources


def use_in(model: Any) -> None:
    """Make the layers of a transformers model attend over a prefix forest."""
    # Registered here because access to transformers takes seconds and a driver runs no model.
    transformers.AttentionInterface.register("prefix_tree", prefix_tree_attention)
    model.set_attn_implementation("prefix_tree")


def prefix_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    forest: ForestState | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Return the attention of the chunk's queries [1, H, C, D] to its keys, as [1, C, H, D].

    Raises ValueError if the architecture passes an argument of NOT_SUPPORTED.
    """
    assert forest is not None, "prefix_tree attention needs a forest: see models/hidden_states.py"
    for name in NOT_SUPPORTED & arguments.keys():
        if arguments[name] is not None:
            raise ValueError(f"attention with {name} cannot run packed")
    sources = forest.extend(module, key, value)
    grouped = key.shape[1] != query.shape[1]
    if forest.block_mask is not None:
        from l2d_ray.models import flex_attention

        output = flex_attention.attention(query, *_split(sources[0]), forest.block_mask, scaling, grouped)
        return output.transpose(1, 2).contiguous(), None
    outputs = [
        scaled_dot_product_attention(
            query[:, :, queries],
            *_split(_join(_pieces(sources, keys))),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
        for queries, keys, mask in forest.blocks
    ]
    return torch.cat(outputs, dim=1), None


def _split(keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values, each [1, H, N, D], of N tokens [N, 2 H, D]."""
    key, value = keys_and_values.transpose(0, 1)[None].chunk(2, dim=1)
    return key, value


def _blocks(chunk: Chunk, dtype: torch.dtype) -> list[tuple[slice, IntArray, Tensor]]:
    """Return each block's queries, keys and additive mask [1, 1, queries, keys]."""
    blocks = []
    path = len(chunk.path)
    for start, stop in _bounds(chunk):
        before = slice(path + start)
        is_open = (chunk.starts[before] < path + stop) & (chunk.ends[before] > path + start)
        queries = np.arange(path + start, path + stop)
        keys = np.concatenate([np.flatnonzero(is_open), queries])
        visible = (chunk.starts[keys] <= queries[:, None]) & (queries[:, None] < chunk.ends[keys])
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), -torch.inf)
        blocks.append((slice(start, stop), keys, mask[None, None]))
    return blocks


def _bounds(chunk: Chunk) -> list[tuple[int, int]]:
    """Split the queries into blocks (start, stop), as long as QUERIES_PER_BLOCK and PAIRS_PER_CALL allow."""
    path, length = len(chunk.path), len(chunk.tokens)
    queries = np.arange(path, path + length + 1)
    opened = np.searchsorted(np.sort(chunk.starts), queries).tolist()
    closed = np.searchsorted(np.sort(chunk.ends), queries, side="right").tolist()

    def pairs(start: int, stop: int) -> int:
        keys: int = opened[stop] - closed[start]
        return (stop - start) * keys

    ends = np.union1d(np.flatnonzero(np.diff(closed)) + 1, np.arange(0, length, QUERIES_PER_BLOCK)[1:])
    blocks, start, stop = list[tuple[int, int]](), 0, 0
    for end in [*ends[ends < length].tolist(), length]:
        split = pairs(start, stop) + pairs(stop, end) + PAIRS_PER_CALL
        if stop and (end - start > QUERIES_PER_BLOCK or pairs(start, end) > split):
            blocks.append((start, stop))
            start = stop
        stop = end
    return [*blocks, (start, stop)]


def _pieces(sources: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    chosen = ((sources[number], rows) for number, rows in parts)
    return [source[rows] if isinstance(rows, slice) else source.index_select(0, rows) for source, rows in chosen]


def _join(pieces: list[Tensor]) -> Tensor:
    """Concatenate tensors. One alone is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
