"""Linear layers on 8-bit integers, for processors that multiply these natively (AVX-512 VNNI): inference only.

Weights are rounded to 8 bits, with one scale an output channel. Inputs have outliers, and rounded to 8 bits (as
libraries do) they cost Recall, so that an input is the sum of two 8-bit integers, with one scale a token: twice the
products, in a third of the time of one in float32. Integer products are exact: what else is in a batch changes nothing.
"""

import torch
from torch import Tensor, nn

from l2d_ray.errors import InputError

LARGEST = 127
"""Integers are from -127 to 127."""
NEARLY_ALL = 0.9


class Int8Linear(nn.Module):
    """`x W^T + b` for a linear layer of M inputs and N outputs, to within the rounding of W to 8 bits."""

    weight: Tensor
    """[N, M] int8."""
    scale_N: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """The weights of a float32 layer."""
        super().__init__()
        scale_N = _scale(linear.weight)
        self.register_buffer("weight", (linear.weight / scale_N).round().to(torch.int8))
        self.register_buffer("scale_N", scale_N[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] float32 to [..., N] float32."""
        rows = x.reshape(-1, x.shape[-1])
        scale = _scale(rows)
        rows = rows / scale
        coarse = rows.round()
        fine = rows.sub_(coarse).mul_(2 * LARGEST).round_()  # what is left is at most a half
        both = torch.cat([coarse.to(torch.int8), fine.to(torch.int8)])  # as one product: the weights are read once
        coarse, fine = torch._int_mm(both, self.weight.t()).to(torch.float32).chunk(2)
        result = coarse.add_(fine, alpha=1 / (2 * LARGEST)).mul_(scale).mul_(self.scale_N)
        if self.bias is not None:
            result.add_(self.bias)
        return result.view(*x.shape[:-1], self.scale_N.numel())


def is_supported() -> bool:
    """Whether this processor's integer products are quick and exact.

    Without AVX-512, PyTorch takes them one by one, which is exact and tens of times slower than float32; without VNNI,
    sums of two products are cut at 16 bits.
    """
    extremes = torch.tensor([LARGEST, -LARGEST], dtype=torch.int8).repeat(8)[:, None].expand(16, 64).contiguous()
    exact = torch.equal(torch._int_mm(extremes, extremes.t()).double(), extremes.double() @ extremes.t().double())
    return exact and bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def quantize(model: nn.Module) -> None:
    """Exchange every nn.Linear within a float32 model for an Int8Linear.

    Raises InputError if that is not nearly all of its weights, or if this processor has no such products.
    """
    if not is_supported():
        raise InputError("model.dtype='int8': this processor has no AVX-512 VNNI for 8-bit products; use float32")
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward
    ]
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    total = sum(weight.numel() for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim > 1)
    share = sum(linear.weight.numel() for _, _, linear in linears) / max(total, 1)
    if share < NEARLY_ALL:
        raise InputError(
            f"model.dtype='int8': only {share:.0%} of the weights of {type(model).__name__} are those of linear layers;"
            " use float32"
        )
    with torch.inference_mode():
        while linears:  # so that each is free at once
            parent, name, linear = linears.pop()
            setattr(parent, name, Int8Linear(linear))
            del linear


def _scale(rows: Tensor) -> Tensor:
    """[R, 1] what a row is to be divided by."""
    return rows.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
