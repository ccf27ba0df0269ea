"""Linear layers on 8-bit integers, for inference on processors with AVX-512 VNNI.

Weights are rounded to 8 bits, with one scale for each output channel. Inputs have outliers; rounding them to 8 bits, as
libraries do, costs Recall. So an input is represented as the sum of two 8-bit integers, with one scale for each token.
That doubles the products, yet both together take a third of the time of one float32 product.

Integer products are exact, so a token's result does not depend on the rest of its batch.
"""

import torch
from torch import Tensor, nn

from l2d_ray.errors import InputError
from l2d_ray.models.linear_layers import linears_of, replace_linears

LARGEST = 127
"""Integers range from -127 to 127."""
ROWS = 512
"""Tokens of one product for each thread. The sums of more leave the processor's cache; fewer make threads wait for each
other (`jobs/RESULTS.md`, *Building a memory*)."""
MIN_LINEAR_SHARE = 0.9
"""Share of a model's weights that must be in linear layers: below it, int8 gains too little."""


class Int8Linear(nn.Module):
    """A linear layer of M inputs and N outputs, `x W^T + b`, with W rounded to 8 bits."""

    weight: Tensor
    """[N, M] int8."""
    scale_N: Tensor
    """[N] float32: the weights of output n are `weight[n] * scale_N[n]`."""

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weights of a float32 layer."""
        super().__init__()
        scale_N = _scale(linear.weight)
        self.register_buffer("weight", (linear.weight / scale_N).round().to(torch.int8))
        self.register_buffer("scale_N", scale_N[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., M] float32 to [..., N] float32."""
        rows = x.reshape(-1, x.shape[-1])
        result = rows.new_empty(len(rows), self.scale_N.numel())
        step = ROWS * torch.get_num_threads()
        for start in range(0, len(rows), step):
            self._multiply(rows[start : start + step], result[start : start + step])
        if self.bias is not None:
            result.add_(self.bias)
        return result.view(*x.shape[:-1], self.scale_N.numel())

    def _multiply(self, rows: Tensor, result: Tensor) -> None:
        """Write `rows W^T` into `result`."""
        scale = _scale(rows)
        rows = rows / scale
        coarse = rows.round()
        fine = rows.sub_(coarse).mul_(2 * LARGEST).round_()  # the remainder is at most 0.5
        both = torch.cat([coarse.to(torch.int8), fine.to(torch.int8)])  # one product reads the weights once
        coarse, fine = torch._int_mm(both, self.weight.t()).to(torch.float32).chunk(2)
        torch.mul(coarse.add_(fine, alpha=1 / (2 * LARGEST)).mul_(scale), self.scale_N, out=result)


def is_supported() -> bool:
    """Return whether this processor's integer products are fast and exact.

    Without AVX-512, PyTorch computes them one at a time: exact, but tens of times slower than float32. Without VNNI,
    sums of two products saturate at 16 bits.
    """
    extremes = torch.tensor([LARGEST, -LARGEST], dtype=torch.int8).repeat(8)[:, None].expand(16, 64).contiguous()
    exact = torch.equal(torch._int_mm(extremes, extremes.t()).double(), extremes.double() @ extremes.t().double())
    return exact and bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def quantise(model: nn.Module) -> None:
    """Replace every nn.Linear of a float32 model by an Int8Linear.

    Raises InputError if the processor does not support it, or if too few of the weights are in linear layers.
    """
    if not is_supported():
        raise InputError("model.dtype='int8': this processor has no AVX-512 VNNI for 8-bit products; use float32")
    share = sum(linear.weight.numel() for _, _, linear in linears_of(model)) / max(_count_weights(model), 1)
    if share < MIN_LINEAR_SHARE:
        raise InputError(
            f"model.dtype='int8': only {share:.0%} of the weights of {type(model).__name__} are in linear layers; use"
            " float32"
        )
    replace_linears(model, Int8Linear)


def _count_weights(model: nn.Module) -> int:
    """Count the weights of all matrices outside embeddings."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    return sum(weight.numel() for layer in layers for weight in layer.parameters(recurse=False) if weight.ndim > 1)


def _scale(rows: Tensor) -> Tensor:
    """Return the scale [R, 1] of R rows: divided by it, a row ranges from -LARGEST to LARGEST."""
    return rows.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
