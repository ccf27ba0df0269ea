"""The same layers with fewer passes over memory.

On a CPU a matrix product runs at full speed and what stands between two of them waits for memory: written as in
transformers, norms, rotations and gates cost a quarter of the products. Here they work in place. A layer is exchanged
only if its code is, to the letter, that of transformers' Llama, which most families copy (Qwen, Mistral, …); others
stay as they are. Inference only: in-place layers have no gradient.

Norms and gates are exchanged in one model; the rotation is a function of transformers' module, so that it is exchanged
for every model of that architecture in the process.
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama


def fuse_layers(model: nn.Module) -> None:
    """Exchange the layers of `model` whose code is known for the ones below."""
    for module in model.modules():
        for original, fused in FUSED:
            if _same_code(type(module).forward, original):
                # Not bound to itself: such a module stays until Python looks for cycles, which replicas hardly do.
                module.forward = partial(fused, weakref.proxy(module))
    architecture = sys.modules[type(model).__module__]
    originals = {"apply_rotary_pos_emb": _ROTATE, "rotate_half": modeling_llama.rotate_half}  # the one calls the other
    if all(_same_code(getattr(architecture, name, None), original) for name, original in originals.items()):
        architecture.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


def rms_norm(self: Any, hidden: Tensor) -> Tensor:
    """LlamaRMSNorm.forward: hidden / sqrt(mean(hidden^2) + eps) * weight, the mean in float32."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(hidden.shape[-1]).add_(self.variance_epsilon).rsqrt_()
    normed: Tensor = (hidden * scale).to(hidden.dtype).mul_(self.weight)
    return normed


def gated_mlp(self: Any, hidden: Tensor) -> Tensor:
    """LlamaMLP.forward: down(act(gate(hidden)) * up(hidden))."""
    gate = self.gate_proj(hidden)
    gate = nn.functional.silu(gate, inplace=True) if isinstance(self.act_fn, nn.SiLU) else self.act_fn(gate)
    return self.down_proj(gate.mul_(self.up_proj(hidden)))  # type: ignore[no-any-return]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: x * cos + rotate_half(x) * sin, for queries and keys [1, H, C, D]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2

    def rotated(x: Tensor) -> Tensor:
        result = x * cos
        result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        result[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return result

    return rotated(q), rotated(k)


FUSED: list[tuple[Callable[..., Any], Callable[..., Tensor]]] = [
    (modeling_llama.LlamaRMSNorm.forward, rms_norm),
    (modeling_llama.LlamaMLP.forward, gated_mlp),
]
_ROTATE = modeling_llama.apply_rotary_pos_emb  # kept: fuse_layers replaces it


def _same_code(function: Callable[..., Any] | None, original: Callable[..., Any]) -> bool:
    return inspect.isfunction(function) and inspect.getsource(function) == inspect.getsource(original)
