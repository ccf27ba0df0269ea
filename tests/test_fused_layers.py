import json
import subprocess
import sys

import pytest
import torch
from support.tiny_models import save_tiny
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from l2d_ray.models.fused_layers import fuse_layers, gated_mlp, rms_norm, rotate

# Both programs run in new processes, because loading a backbone replaces transformers' rotation in the whole process.
UNPATCHED = """
import json, sys, torch, transformers
for name in sys.argv[2:]:
    model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    with torch.no_grad():
        states = [model(torch.tensor([prompt])).last_hidden_state[0, -1].tolist() for prompt in json.loads(sys.argv[1])]
    print(json.dumps(states))
"""
PACKED = """
import json, sys, numpy as np
from l2d_ray.config import ModelConfig
from l2d_ray.core.packing import Prompts
from l2d_ray.models.backbone import load_backbone
from l2d_ray.models.hidden_states import packed_states
prompts = Prompts.join([np.array(prompt, np.int32) for prompt in json.loads(sys.argv[1])])
for name in sys.argv[2:]:
    print(json.dumps(packed_states(load_backbone(ModelConfig(name=name)), prompts, 5).states.tolist()))
"""
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20], [5, 6, 7, 8, 9, 30, 31, 32], [40]]
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute each family's states with plain transformers and packed."""
    models = [save_tiny(tmp_path_factory.mktemp(family), family) for family in FAMILIES]
    outputs = (
        subprocess.check_output([sys.executable, "-c", code, json.dumps(PROMPTS), *models]).splitlines()
        for code in (UNPATCHED, PACKED)
    )
    pairs = [
        (torch.tensor(json.loads(plain)), torch.tensor(json.loads(packed)))
        for plain, packed in zip(*outputs, strict=True)
    ]
    return dict(zip(FAMILIES, pairs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_of_fused_layers_equal_those_of_transformers(
    family: str, states: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    plain, packed = states[family]
    assert ((packed - plain).norm(dim=1) / plain.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    norm = modeling_llama.LlamaRMSNorm(48).to(dtype)
    norm.weight.data.normal_()
    hidden = torch.randn(1, 9, 48, dtype=dtype)
    with torch.inference_mode():
        expected = norm(hidden)
        torch.testing.assert_close(rms_norm(norm, hidden), expected)


def test_the_gated_mlp_equals_that_of_transformers_and_keeps_its_input() -> None:
    config = modeling_llama.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    mlp, hidden = modeling_llama.LlamaMLP(config), torch.randn(1, 5, 16)
    before = hidden.clone()
    with torch.inference_mode():
        torch.testing.assert_close(gated_mlp(mlp, hidden), mlp(hidden))
    assert (hidden == before).all()


def test_the_rotation_equals_that_of_transformers_and_keeps_its_input() -> None:
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    angles = torch.randn(1, 6, 4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    half = modeling_llama.rotate_half
    expected = [x * cos.unsqueeze(1) + half(x) * sin.unsqueeze(1) for x in (query, key)]
    before = query.clone()
    for result, wanted in zip(rotate(query, key, cos, sin), expected, strict=True):
        torch.testing.assert_close(result, wanted)
    assert (query == before).all()


def test_layers_with_other_source_code_are_not_replaced() -> None:
    model = modeling_gpt2.GPT2Model(modeling_gpt2.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    fuse_layers(model)
    assert not any("forward" in vars(module) for module in model.modules())
