"""The prefix tree's attention on a GPU: PyTorch's FlexAttention, compiled; to import it takes a second."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from l2d_ray.core.packing import Chunk


def block_mask(chunk: Chunk, device: torch.device) -> BlockMask:
    """Which key each query of a chunk may see; FlexAttention skips the blocks of 128 x 128 that hold none."""
    path = len(chunk.path)
    starts, ends = (torch.from_numpy(keys).to(device) for keys in (chunk.starts, chunk.ends))

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[key] <= query + path) & (query + path < ends[key])

    return create_block_mask(visible, B=None, H=None, Q_LEN=len(chunk.tokens), KV_LEN=len(chunk.ends), device=device)


@torch.compile(dynamic=True)
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, grouped: bool
) -> Tensor:
    """Attention of queries [1, H, C, D] to keys and values [1, G, P + C, D]; [1, H, C, D]."""
    output = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scaling,
        enable_gqa=grouped,
        # Not "AUTO": the decoding kernel, which that takes below 128 queries, has no configuration for some numbers of
        # these (https://github.com/pytorch/pytorch/pull/185349).
        kernel_options={"BACKEND": "TRITON"},
    )
    assert isinstance(output, Tensor)
    return output
