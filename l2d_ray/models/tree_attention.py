"""Attention over a prefix forest, as an attention implementation that transformers can call.

`transformers.AttentionInterface` hands every layer's queries, keys and values to the function registered here, whatever
the architecture. Which key a query may see follows from the chunk's `starts` and `ends` alone (`core/packing.py`): key
k is seen by query q exactly when `starts[k] <= q < ends[k]`.

On a CPU the queries go in blocks; a block needs the keys that are open at any of its queries: few, so that the work is
that of the tree and not the square of the chunk. On a GPU the same rule is a FlexAttention block mask
(`flex_attention.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from l2d_ray.core.packing import Chunk, IntArray

NOT_SUPPORTED = {"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"}
"""What some architectures also pass and what would change the numbers, so that it must not be ignored."""
QUERIES_PER_BLOCK = 64
"""At most: fewer keys a block against fewer calls. On one AVX-512 machine 32 was slower, 128 the same within noise."""
PAIRS_PER_CALL = 1000
"""A block is ended early, where keys close, if that saves more pairs of query and key than another call costs."""


class ForestState:
    """What the layers need to know of the forest: the current chunk, and the keys and values of its path."""

    def __init__(self, device: torch.device, known: Sequence[Sequence[Tensor]] = ()) -> None:
        """A state before any chunk. One state serves one forest.

        `known[n]` holds, layer by layer, the keys and values [tokens, 2 H, D] of a prompt's beginning; `forest.known`
        points into these, one after the other.
        """
        self._device = device
        self._known = zip(*known, strict=True)
        self._sizes = [len(layers[0]) for layers in known]
        self._path: list[tuple[int, int, int]] = []
        self._keys_and_values: dict[nn.Module, Tensor] = {}
        self.blocks: list[tuple[slice, Tensor, Tensor]] = []
        self.block_mask: Any = None

    def enter(self, chunk: Chunk, dtype: torch.dtype) -> None:
        """Prepare for the forward pass of the next chunk."""
        self._path, self._sizes = _runs(chunk.path, self._sizes), [len(chunk.ends)]
        if self._device.type == "cuda":
            from l2d_ray.models import flex_attention

            self.block_mask = flex_attention.block_mask(chunk, self._device)
        else:
            self.blocks = _blocks(chunk, dtype)

    def run(self, model: Any, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """[C, D] the last hidden states of the next chunk's tokens, of a model whose attention this is."""
        self.enter(chunk, dtype)
        states: Tensor = model(
            input_ids=torch.from_numpy(chunk.tokens)[None].to(self._device),
            position_ids=torch.from_numpy(chunk.positions)[None].to(self._device),
            use_cache=False,
            forest=self,
        ).last_hidden_state[0]
        return states

    @property
    def layers(self) -> list[Tensor]:
        """The keys and values [P + C, 2 H, D] of each layer, after the forward pass of the current chunk."""
        return list(self._keys_and_values.values())

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> Tensor:
        """The path's keys and values before those of the chunk [1, H, C, D]: [P + C, 2 H, D], kept for the next chunk.

        A token's keys and values lie side by side, as the projections leave them, so that a token is copied at once.
        """
        own = torch.cat([key.transpose(1, 2)[0], value.transpose(1, 2)[0]], dim=1)
        if self._path:
            before = (self._keys_and_values[layer],) if layer in self._keys_and_values else next(self._known)
            own = torch.cat([*(before[tensor][start:stop] for tensor, start, stop in self._path), own])
        # Detached: training has one chunk, and would else hold what gradient checkpointing means to drop.
        self._keys_and_values[layer] = own.detach()
        return own


def use_in(model: Any) -> None:
    """Have the layers of a transformers model attend over a prefix forest."""
    # Not when this module is read: it takes seconds, and a driver, which runs no model, does without.
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
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of the chunk's queries [1, H, C, D] to its keys; returns [1, C, H, D] as transformers expects."""
    assert forest is not None, "this attention needs a forest: see models/hidden_states.py"
    for name in NOT_SUPPORTED & more.keys():
        if more[name] is not None:
            raise ValueError(f"attention with {name} cannot run packed")
    both = forest.extend(module, key, value)
    grouped = key.shape[1] != query.shape[1]
    if forest.block_mask is not None:
        from l2d_ray.models import flex_attention

        output = flex_attention.attention(query, *_split(both), forest.block_mask, scaling, grouped)
        return output.transpose(1, 2).contiguous(), None
    outputs = [
        scaled_dot_product_attention(
            query[:, :, queries],
            *_split(both.index_select(0, keys)),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
        for queries, keys, mask in forest.blocks
    ]
    return torch.cat(outputs, dim=1), None


def _split(both: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, N, D] of N tokens [N, 2 H, D]."""
    key, value = both.transpose(0, 1)[None].chunk(2, dim=1)
    return key, value


def _blocks(chunk: Chunk, dtype: torch.dtype) -> list[tuple[slice, Tensor, Tensor]]:
    """For each block of queries: which queries, which keys, and the additive mask [1, 1, queries, keys]."""
    blocks = []
    path = len(chunk.path)
    for start, stop in _bounds(chunk):
        before = slice(path + start)
        is_open = (chunk.starts[before] < path + stop) & (chunk.ends[before] > path + start)
        queries = np.arange(path + start, path + stop)
        keys = np.concatenate([np.flatnonzero(is_open), queries])
        visible = (chunk.starts[keys] <= queries[:, None]) & (queries[:, None] < chunk.ends[keys])
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), -torch.inf)
        blocks.append((slice(start, stop), torch.from_numpy(keys), mask[None, None]))
    return blocks


def _bounds(chunk: Chunk) -> list[tuple[int, int]]:
    """The blocks, from first query to one past the last: as long as they may be, unless another call costs less."""
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
        apart = pairs(start, stop) + pairs(stop, end) + PAIRS_PER_CALL
        if stop and (end - start > QUERIES_PER_BLOCK or pairs(start, end) > apart):
            blocks.append((start, stop))
            start = stop
        stop = end
    return [*blocks, (start, stop)]


def _runs(places: IntArray, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Places in tensors of these sizes, one after the other, as slices: which tensor, start, stop."""
    bounds = np.cumsum([0, *sizes])
    tensors = np.searchsorted(bounds, places, side="right") - 1
    cuts = np.flatnonzero((np.diff(places) != 1) | (np.diff(tensors) != 0)) + 1
    parts = zip(np.split(tensors, cuts), np.split(places - bounds[tensors], cuts), strict=True)
    return [(int(tensor[0]), int(own[0]), int(own[-1]) + 1) for tensor, own in parts if own.size]
