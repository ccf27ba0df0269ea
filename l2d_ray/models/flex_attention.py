"""Prefix-tree attention on a GPU: PyTorch's FlexAttention, compiled. Importing this module takes a second.

Shapes: C tokens of a chunk, P tokens of its path, H query heads, G key heads, D size of a head.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from l2d_ray.core.packing import Chunk


def block_mask(chunk: Chunk, device: torch.device) -> BlockMask:
    """Return the mask of the keys that each query of a chunk attends to.

    FlexAttention skips blocks of 128 x 128 in which no query attends to a key.
    """
    path = len(chunk.path)
    starts, ends = (torch.from_numpy(keys).to(device) for keys in (chunk.starts, chunk.ends))

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[key] <= query + path) & (query + path < ends[key])

    return create_block_mask(visible, B=None, H=None, Q_LEN=len(chunk.tokens), KV_LEN=len(chunk.ends), device=device)


@torch.compile(dynamic=True)
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, grouped: bool
) -> Tensor:
    """Return the attention [1, H, C, D] of queries [1, H, C, D] to keys and values [1, G, P + C, D]."""
    output = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=grouped,
        # Below 128 queries "AUTO" takes the decoding kernel, which has no configuration for some numbers of queries
        # (https://github.com/pytorch/pytorch/pull/185349).
        kernel_options={"BACKEND": "TRITON"},
    )
    assert isinstance(output, Tensor)
    return output
