"""Linear layers with packed weights: the results of PyTorch's own."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_tiny
from torch import nn

from l2d_ray.config import ModelConfig
from l2d_ray.models.backbone import load_backbone
from l2d_ray.models.linear_layers import PackedLinear, pack_linears

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "shape"),
    [(576, 1536, [1, 20]), (33, 7, [2, 3]), (8, 1, [1, 1]), (8, 4, [1, 0]), (1536, 576, [300]), (1, 1, [5])],
)
@torch.inference_mode()
def test_results_are_those_of_the_layer(inputs: int, outputs: int, shape: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, inputs, dtype=dtype)
    for bias in (False, True):
        linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
        packed = PackedLinear(linear)
        result, expected = packed(x), linear(x.double().to(dtype))
        assert (result.shape, result.dtype) == (expected.shape, dtype)
        scale = expected.abs().max() if expected.numel() else 1
        torch.testing.assert_close(result / scale, expected / scale, rtol=0, atol=TOLERANCE[dtype])
        assert torch.equal(packed.weight, linear.weight)


def test_rows_that_are_not_contiguous() -> None:
    linear, x = nn.Linear(16, 8), torch.randn(16, 40).t()
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x).detach())


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "float32")])
def test_a_loaded_model_has_packed_layers_only(tmp_path: Path, family: str, dtype: str) -> None:
    layers = list(load_backbone(ModelConfig(name=save_tiny(tmp_path, family)), dtype).model.modules())
    assert len([layer for layer in layers if isinstance(layer, PackedLinear)]) == 7 * 2
    assert not [layer for layer in layers if isinstance(layer, nn.Linear)]


def test_a_layer_that_computes_something_else_stays() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.LayerNorm(4))
    original, x = copy.deepcopy(model), torch.randn(3, 4)
    pack_linears(model)
    assert [type(layer) for layer in model] == [PackedLinear, Doubled, nn.LayerNorm]
    torch.testing.assert_close(model(x).detach(), original(x).detach())


def test_a_processor_that_cannot_pack_bfloat16_runs_it_unpacked(tmp_path: Path) -> None:
    code = (
        "import sys; from l2d_ray.models.backbone import load_backbone; from l2d_ray.config import ModelConfig;"
        "model = load_backbone(ModelConfig(name=sys.argv[1]), 'bfloat16').model;"
        "print({type(layer).__name__ for layer in model.modules() if 'Linear' in type(layer).__name__})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, save_tiny(tmp_path)],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "{'Linear'}"
