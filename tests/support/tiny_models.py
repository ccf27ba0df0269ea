"""Two-layer random language models and a small tokenizer, saved as ordinary model folders."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from l2d_ray.config import ModelConfig
from l2d_ray.models.backbone import Backbone, load_backbone
from l2d_ray.models.int8_linear import is_supported

torch.set_num_threads(1)  # with products this small a second thread only adds waiting

CORPUS = [
    "The user watched or bought, in this order:\n",
    "Next:",
    *(f"Title {n} of the year, part {n}\n" for n in range(60)),
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}


def tiny_tokenizer(adds_bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most 400 tokens. Like the tokenizers of real models it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    """Make the configuration of a small model. llama, qwen2 and qwen3 have two query heads for each key head."""
    sizes = SIZES | SPECIAL | {"vocab_size": 400} | changes
    if family in ("qwen3", "gemma2"):
        sizes = {"head_dim": 8} | sizes
    return transformers.AutoConfig.for_model(family, **sizes)


def tiny_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """Make a model with random weights, large enough that attention is far from uniform and biases and norms matter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2:
                    scale = 1.0 if isinstance(module, nn.Embedding) else 1.2 / config.hidden_size**0.5
                    parameter.normal_(0, scale)
                else:
                    parameter.normal_(1.0 if "norm" in type(module).__name__.lower() and name == "weight" else 0.0, 0.2)
    return model


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> str:
    """Write a model folder for `model.name` and return its path."""
    tiny_model(tiny_config(family, **changes), seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def load_tiny(folder: Path, family: str = "llama", **changes: Any) -> Backbone:
    """Write a model folder and load its backbone."""
    return load_backbone(ModelConfig(name=save_tiny(folder, family, **changes)))


def full_model(folder: str) -> Any:
    """Load a model with plain transformers, with its head."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def save_adapter(folder: Path, model: str, seed: int = 0) -> str:
    """Write a LoRA adapter for `model` that changes its output, and return its path."""
    torch.manual_seed(seed)
    lora = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    peft.get_peft_model(full_model(model), lora).save_pretrained(folder)
    return str(folder)


needs_int8 = pytest.mark.skipif(not is_supported(), reason="this processor has no AVX-512 VNNI")
