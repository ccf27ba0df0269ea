"""Linear layers for inference on a CPU, their weights laid out once as oneDNN's matrix products read them.

PyTorch's own layer rearranges its weights in every product, which costs most where a batch has few tokens. On one
thread with AVX-512 in float32, a packed product of 4 tokens took half of the time. One of 16 tokens took 0.7 of it, one
of 1,000 tokens 0.85 to 0.9. With AVX2 alone that is 0.6, 0.8 and 0.95. In bfloat16 it is 0.55, 0.8 and 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

TOKENS = 64
"""Tokens of a batch that the layout is made for. Layouts for 16 to 1,024 tokens run any batch as fast; that for 1 token
is slower."""


class PackedLinear(nn.Module):
    """A linear layer of M inputs and N outputs, `x W^T + b`, without a gradient."""

    packed: Tensor
    """[N, M] in a layout of oneDNN, which only its products can read."""

    def __init__(self, linear: nn.Linear) -> None:
        """Copy the weights of a layer in float32 or bfloat16."""
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TOKENS)
        self.register_buffer("packed", packed, persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """Return the weights [N, M] as they were. Some architectures multiply by them themselves."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., M] to [..., N]."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


def pack_linears(model: nn.Module) -> None:
    """Replace every nn.Linear of a model in float32 or bfloat16 by a PackedLinear, if oneDNN can pack on this machine.

    It packs bfloat16 on processors with AVX-512 or AVX-NE-CONVERT.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    if next(model.parameters()).dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        replace_linears(model, PackedLinear)


def linears_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return each plain nn.Linear of a model, after the module that has it and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward
    ]


def replace_linears(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every plain nn.Linear of a model, one by one: each is freed before the next is replaced."""
    linears = linears_of(model)
    with torch.inference_mode():
        while linears:
            parent, name, linear = linears.pop()
            setattr(parent, name, replacement(linear))
            del linear
