"""Attention over a prefix forest, as an attention implementation that transformers can call.

`transformers.AttentionInterface` hands every layer's queries, keys and values to the function registered here, whatever
the architecture. Which key a query may see follows from the chunk's `ends` alone (`core/packing.py`): key k is seen by
query q exactly when `k <= q < ends[k]`.

On a CPU the queries go in blocks; a block needs the keys that are still open at its first query, and its own: few, so
that the work is that of the tree and not the square of the chunk. On a GPU the same rule is a FlexAttention block mask.
"""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from l2d_ray.core.packing import Chunk

NAME = "prefix_tree"
NOT_SUPPORTED = {"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"}
"""What some architectures also pass and what would change the numbers, so that it must not be ignored."""
QUERIES_PER_BLOCK = 64
"""Of 32 to 512, the fastest on AVX2 and AVX-512 machines: fewer keys a block against fewer calls."""


class ForestState:
    """What the layers need to know of the forest: the current chunk, and the keys and values of its path."""

    def __init__(self, device: torch.device) -> None:
        """A state before any chunk. One state serves one forest."""
        self._device = device
        self._path = torch.empty(0, dtype=torch.long, device=device)
        self._keys_and_values: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.blocks: list[tuple[slice, Tensor, Tensor]] = []
        self.block_mask: BlockMask | None = None

    def enter(self, chunk: Chunk, dtype: torch.dtype) -> None:
        """Prepare for the forward pass of the next chunk."""
        self._path = torch.from_numpy(chunk.path).to(self._device)
        if self._device.type == "cuda":
            self.block_mask = _block_mask(chunk, self._device)
        else:
            self.blocks = _blocks(chunk, dtype)

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the path's keys and values [1, H, P, D] before its own [1, H, C, D]; remember all for the next chunk."""
        if len(self._path):
            before_key, before_value = self._keys_and_values[layer]
            key = torch.cat([_take(before_key, self._path), key], dim=2)
            value = torch.cat([_take(before_value, self._path), value], dim=2)
        self._keys_and_values[layer] = key, value
        return key, value


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
    key, value = forest.extend(module, key, value)
    grouped = key.shape[1] != query.shape[1]
    if forest.block_mask is not None:
        output = _compiled_flex_attention(query, key, value, forest.block_mask, scaling, grouped)
        return output.transpose(1, 2).contiguous(), None
    output = torch.empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
    for queries, keys, mask in forest.blocks:
        block = scaled_dot_product_attention(
            query[:, :, queries],
            _take(key, keys),
            _take(value, keys),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=grouped,
        )
        output[:, queries] = block.transpose(1, 2)
    return output, None


def _take(states: Tensor, tokens: Tensor) -> Tensor:
    """[1, H, C, D] at some tokens. Projections leave a token's heads side by side in memory, so take whole tokens."""
    return states.transpose(1, 2).index_select(1, tokens).transpose(1, 2)


def _blocks(chunk: Chunk, dtype: torch.dtype) -> list[tuple[slice, Tensor, Tensor]]:
    """For each block of queries: which queries, which keys, and the additive mask [1, 1, queries, keys]."""
    blocks = []
    length, path = len(chunk.tokens), len(chunk.path)
    for start in range(0, length, QUERIES_PER_BLOCK):
        stop = min(start + QUERIES_PER_BLOCK, length)
        still_open = np.flatnonzero(chunk.ends[: path + start] > path + start)
        queries = np.arange(path + start, path + stop)
        keys = np.concatenate([still_open, queries])
        visible = (keys <= queries[:, None]) & (queries[:, None] < chunk.ends[keys])
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~torch.from_numpy(visible), -torch.inf)
        blocks.append((slice(start, stop), torch.from_numpy(keys), mask[None, None]))
    return blocks


def _block_mask(chunk: Chunk, device: torch.device) -> BlockMask:
    """The same rule for FlexAttention, which skips the blocks of 128 x 128 that hold no visible key."""
    path = len(chunk.path)
    ends = torch.from_numpy(chunk.ends).to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + path) & (query + path < ends[key])

    return create_block_mask(visible, B=None, H=None, Q_LEN=len(chunk.tokens), KV_LEN=len(chunk.ends), device=device)


@torch.compile(dynamic=True)  # compiled at the first call, and only on a GPU
def _compiled_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scaling: float | None, grouped: bool
) -> Tensor:
    output = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=grouped)
    assert isinstance(output, Tensor)
    return output


transformers.AttentionInterface.register(NAME, prefix_tree_attention)
