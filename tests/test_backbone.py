import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny_models import full_model, save_adapter, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from torch import Tensor

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import Backbone, load_backbone, load_causal_model
from l2d_ray.models.identity import identify

TOKENS = torch.arange(20, 60)[None]


def states(model: Any) -> Tensor:
    """Return the last hidden states [T, D] of TOKENS."""
    model = model.model if isinstance(model, Backbone) else model
    with torch.inference_mode():
        output = model(TOKENS, output_hidden_states=True)
    return getattr(output, "last_hidden_state", output.hidden_states[-1])[0]


def refusal(folder: str | Path, **settings: Any) -> str:
    """Return the one-line error message of loading a model."""
    with pytest.raises(InputError) as caught:
        load_backbone(ModelConfig(name=str(folder), **settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapter(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), llama)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "nanochat"])
def test_states_are_taken_after_the_final_norm(tmp_path: Path, family: str) -> None:
    expected = states(tiny_model(tiny_config(family)))  # before loading replaces layers of the family
    backbone = load_backbone(ModelConfig(name=save_tiny(tmp_path, family)))
    torch.testing.assert_close(states(backbone), expected, rtol=1e-5, atol=1e-5)
    assert backbone.dimension == 32
    assert backbone.context_length == 512
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_an_adapter_is_merged(llama: str, adapter: str) -> None:
    expected = states(peft.PeftModel.from_pretrained(full_model(llama), adapter))
    merged = load_backbone(ModelConfig(name=llama, adapter=adapter))
    torch.testing.assert_close(states(merged), expected, rtol=1e-5, atol=1e-5)
    assert (states(load_backbone(ModelConfig(name=llama))) - expected).norm() > 0.1 * expected.norm()
    assert not any("lora" in name for name, _ in merged.model.named_parameters())


def test_a_cut_model_keeps_its_first_layers_and_the_final_norm(tmp_path: Path) -> None:
    for family in ("llama", "qwen3", "gpt2"):
        folder = save_tiny(tmp_path / family, family, num_hidden_layers=3)
        whole = full_model(folder)
        layers = whole.transformer.h if family == "gpt2" else whole.model.layers
        del layers[2]
        cut = load_backbone(ModelConfig(name=folder, num_layers=2))
        torch.testing.assert_close(states(cut), states(whole.base_model), rtol=1e-5, atol=1e-5)
        assert (states(load_backbone(ModelConfig(name=folder))) - states(cut)).norm() > 0.1 * states(cut).norm()


def test_an_adapter_of_the_full_model_fits_the_cut_model(llama: str, adapter: str) -> None:
    whole = peft.PeftModel.from_pretrained(full_model(llama), adapter).merge_and_unload()
    del whole.model.layers[1]
    cut = load_backbone(ModelConfig(name=llama, adapter=adapter, num_layers=1))
    torch.testing.assert_close(states(cut), states(whole.base_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_requested_dtype(llama: str, dtype: str) -> None:
    model = load_backbone(ModelConfig(name=llama), dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("mistral", {"sliding_window": 100}, 100),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 100}, 512),
        ("bloom", {"max_position_embeddings": None}, 2**63 - 1),  # ALiBi has no maximum
    ],
)
def test_a_context_is_as_long_as_positions_or_window(
    tmp_path: Path, family: str, changes: dict[str, Any], length: int
) -> None:
    assert load_backbone(ModelConfig(name=save_tiny(tmp_path, family, **changes))).context_length == length


def test_more_layers_than_the_model_has_are_refused(llama: str) -> None:
    assert refusal(llama, num_layers=3) == f"model.num_layers=3: {llama} has only 2 layers; give at most 2"


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_a_model_that_attends_to_later_tokens_is_refused(tmp_path: Path, family: str) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "d_model": 8, "num_hidden_layers": 1}
    config = transformers.AutoConfig.for_model(family, **sizes, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert refusal(tmp_path) == (
        f"model.name='{tmp_path}': '{family}' is no decoder-only language model; give one that transformers'"
        " AutoModelForCausalLM opens"
    )


def test_a_model_that_reads_images_too_is_refused(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    transformers.Gemma3Config().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="'gemma3' reads more than text; give a model for text alone"):
        load_backbone(ModelConfig(name=str(tmp_path / "model")))


def test_code_in_a_model_folder_is_not_run(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert refusal(tmp_path).startswith(f"model.name='{tmp_path}': The repository {tmp_path} contains custom code")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_refused(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert refusal(tmp_path) == (
        f"{tmp_path}: 1 weights are missing, such as model.layers.1.mlp.up_proj.weight; save the model again"
    )


def test_a_model_folder_without_a_head_loads(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    model.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.testing.assert_close(states(load_backbone(ModelConfig(name=str(tmp_path)))), states(model.base_model))


def test_damaged_files_are_refused(llama: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refusal(tmp_path).startswith(f"{tmp_path}: unreadable weights (")
    (tmp_path / "config.json").write_text("{")
    assert "config.json' is not a valid JSON file" in refusal(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    assert refusal(tmp_path).startswith(f"{tmp_path}: no tokenizer")


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("llama", {"hidden_size": 48}, "Error(s) in loading state_dict"),
        ("llama", {"num_hidden_layers": 3}, "Found missing adapter keys"),
        ("gpt2", {}, "not found in the base model"),
    ],
)
def test_an_adapter_for_another_model_is_refused(
    adapter: str, tmp_path: Path, family: str, changes: dict[str, int], problem: str
) -> None:
    message = refusal(save_tiny(tmp_path, family, **changes), adapter=adapter)
    assert message.startswith(f"model.adapter={adapter}: does not fit the model (")
    assert message.endswith("; give one trained on it")
    assert problem in message


def save_gguf(file: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Any:
    """Write a tiny Llama as llama.cpp does, and return the model of transformers."""
    config = tiny_config("llama")
    model, tokenizer = tiny_model(config), tiny_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = weight.numpy()
        if heads:  # llama.cpp rotates adjacent pairs, transformers halves
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight":
            raw_dtype = kind if array.ndim == 2 and array.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(np.ascontiguousarray(array), raw_dtype)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_loads(tmp_path: Path) -> None:
    expected = save_gguf(tmp_path / "tiny.gguf")
    config = ModelConfig(name=str(tmp_path / "tiny.gguf"))
    backbone = load_backbone(config)
    torch.testing.assert_close(states(backbone), states(expected), rtol=1e-5, atol=1e-5)
    assert backbone.tokenizer("Title 7").input_ids == tiny_tokenizer()("Title 7").input_ids
    assert identify(config, "float32").dimension == backbone.dimension == 32


def test_an_adapter_merges_into_a_quantised_gguf_file(llama: str, adapter: str, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    load_causal_model(ModelConfig(name=str(tmp_path / "tiny.gguf")), "float32").save_pretrained(tmp_path / "plain")
    merged = states(load_backbone(ModelConfig(name=str(tmp_path / "tiny.gguf"), adapter=adapter)))
    expected = states(load_backbone(ModelConfig(name=llama, adapter=adapter)))
    assert 1e-4 < (merged - expected).norm() / expected.norm() < 0.1  # 8 bits per weight
