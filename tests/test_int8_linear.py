import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import needs_int8, save_tiny
from torch import Tensor, nn

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import load_backbone, load_language_model
from l2d_ray.models.hidden_states import relative_error
from l2d_ray.models.int8_linear import Int8Linear


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Make a layer whose outputs have very different magnitudes. The first output is always 0."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight *= torch.logspace(-4, 4, outputs)[:, None]
        linear.weight[0] = 0
    return linear


def rounded(linear: nn.Linear) -> nn.Linear:
    """Copy a layer in float64, its weights rounded to 127 steps per output."""
    weight = linear.weight.double()
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    result = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=torch.float64)
    result.load_state_dict(linear.state_dict() | {"weight": (weight / step).round() * step})
    return result


def rows(count: int, inputs: int) -> Tensor:
    """Make inputs of very different magnitudes, each with one outlier of a thousand times. The first is all 0."""
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, count)[:, None]
    x[:, 3] *= 1000
    x[:1] = 0
    return x


@needs_int8
@pytest.mark.parametrize(
    ("inputs", "outputs", "count"), [(576, 1536, 20), (33, 7, 2), (8, 1, 1), (8, 4, 0), (1536, 576, 300)]
)
@torch.inference_mode()
def test_results_equal_those_of_rounded_weights(inputs: int, outputs: int, count: int) -> None:
    for bias in (False, True):
        linear, x = layer(inputs, outputs, bias), rows(count, inputs)
        result, expected = Int8Linear(linear)(x[None]), rounded(linear)(x.double())
        assert (result.shape, result.dtype) == ((1, count, outputs), torch.float32)
        # The error of an input is at most its row's largest value / (2 * 127 * 254).
        largest = x.abs().amax(1, keepdim=True) * rounded(linear).weight.abs().sum(1)
        assert ((result[0] - expected).abs() <= largest / 60_000 + 1e-6 * expected.abs()).all()


@needs_int8
@torch.inference_mode()
def test_a_tokens_result_does_not_depend_on_its_batch() -> None:
    x, linear = rows(300, 64), Int8Linear(layer(64, 48))
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


@needs_int8
def test_the_head_is_quantised_too(tmp_path: Path) -> None:
    config = ModelConfig(name=save_tiny(tmp_path, "qwen2"))  # qwen2 has biases
    tokens = torch.arange(10, 40)[None]
    quantised, original = load_language_model(config, "int8").model, load_language_model(config).model
    assert not [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    with torch.inference_mode():
        assert 1e-5 < relative_error(quantised(tokens).logits[0], original(tokens).logits[0]) < 5e-2


@needs_int8
@pytest.mark.parametrize("load", [load_backbone, load_language_model])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_model_with_few_linear_layers_is_refused(tmp_path: Path, family: str, load: Callable[..., object]) -> None:
    changes = {"num_local_experts": 4} if family == "mixtral" else {}
    with pytest.raises(InputError, match=r"only \d+% of the weights of \w+ are in linear layers"):
        load(ModelConfig(name=save_tiny(tmp_path, family, **changes)), "int8")


def test_a_processor_without_vnni_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from l2d_ray.models.backbone import load_backbone; from l2d_ray.config import ModelConfig;"
        "load_backbone(ModelConfig(name=sys.argv[1]), 'int8')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, save_tiny(tmp_path)],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},  # hides VNNI where there is any
        capture_output=True,
        text=True,
        check=False,
    )
    assert "InputError: model.dtype='int8': this processor has no AVX-512 VNNI" in run.stderr
