"""Decoder-only language models: loading, with the adapter merged in."""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.checkpoint import Checkpoint, find_adapter, find_model, mark_unquantised
from l2d_ray.models.identity import layers_in_use
from l2d_ray.models.int8_linear import quantise
from l2d_ray.models.linear_layers import pack_linears

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}
"""Dtype of weights and activations, by `model.dtype`. With int8, linear layers multiply 8-bit integers instead."""


@dataclass(frozen=True)
class Backbone:
    """A model without its language-model head: its output is the last layer's hidden states, after the final norm."""

    model: nn.Module
    tokenizer: Any
    dimension: int
    """Size of a hidden state."""
    context_length: int
    """Length of the longest prompt the model can read, in tokens."""
    attention: str
    """Attention implementation that transformers chose: sdpa, or eager for a model that sdpa does not support."""
    dtype: str
    """A value of `model.dtype` other than auto."""
    device: torch.device


@dataclass(frozen=True)
class LanguageModel:
    """A backbone together with the causal language model that contains it, which can generate text."""

    backbone: Backbone
    model: Any
    """A transformers AutoModelForCausalLM that shares the backbone's weights."""


def load_backbone(config: ModelConfig, dtype: str = "float32", device: str = "cpu") -> Backbone:
    """Load the model that `config` names, without its head, in evaluation mode.

    Raises InputError if the model or the adapter is missing, damaged or of the wrong kind.
    """
    return _load(config, dtype, device, head=False).backbone


def load_language_model(config: ModelConfig, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """Load the model that `config` names, with its head. The backbone is on `device`, the head on the CPU.

    Raises InputError as `load_backbone` does, and if the head's weights are missing.
    """
    return _load(config, dtype, device, head=True)


def load_causal_model(config: ModelConfig, dtype: str, head: bool = True) -> Any:
    """Load a transformers AutoModelForCausalLM on the CPU, adapter merged in, layers unchanged. For int8: in float32.

    Raises InputError as `load_backbone` does, and with `head` if the head's weights are missing.
    """
    checkpoint, adapter = find_model(config), find_adapter(config)
    transformers.utils.logging.disable_progress_bar()
    with _without_warnings():
        model = _read_weights(checkpoint, read_architecture(checkpoint, config), DTYPES[dtype], head)
        if checkpoint.gguf:
            mark_unquantised(model)
        return _merge(model, adapter) if adapter else model


def _load(config: ModelConfig, dtype: str, device: str, head: bool) -> LanguageModel:
    # Imported here because the import takes seconds and a driver runs no model.
    from l2d_ray.models.fused_layers import fuse_layers

    model = load_causal_model(config, dtype, head)
    architecture, checkpoint = model.config, find_model(config)
    base = model.base_model.to(device).eval().requires_grad_(False)
    if dtype == "int8":
        quantise(model if head else base)
    elif device == "cpu" and dtype != "float16":
        pack_linears(base)
    fuse_layers(base)
    backbone = Backbone(
        model=base,
        tokenizer=load_tokenizer(checkpoint),
        dimension=architecture.hidden_size,
        context_length=context_length(architecture),
        attention=base.config._attn_implementation,
        dtype=dtype,
        device=torch.device(device),
    )
    return LanguageModel(backbone, model.eval())


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the checkpoint's tokenizer. Raises InputError if it has none."""
    remedy = "save the model's tokenizer there"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**checkpoint.arguments, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint.folder}: no tokenizer that transformers can read ({_first_line(error)}); {remedy}"
        ) from None
    if not tokenizer.vocab_size:  # for some families transformers returns an empty tokenizer when the files are missing
        raise InputError(f"{checkpoint.folder}: no tokenizer; {remedy}")
    return tokenizer


def read_architecture(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """Read the checkpoint's configuration, cut to `model.num_layers`.

    Raises InputError if the model is not a decoder-only language model or has fewer layers.
    """
    try:
        architecture = transformers.AutoConfig.from_pretrained(**checkpoint.arguments, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.name={config.name!r}: {_first_line(error)}; give a model that transformers knows"
        ) from None
    if not _is_decoder_only(type(architecture)):
        raise InputError(
            f"model.name={config.name!r}: {architecture.model_type!r} is no decoder-only language model; give one that"
            " transformers' AutoModelForCausalLM opens"
        )
    if not hasattr(architecture, "hidden_size"):
        raise InputError(
            f"model.name={config.name!r}: {architecture.model_type!r} reads more than text; give a model for text alone"
        )
    if config.num_layers is not None:
        _cut_layers(architecture, layers_in_use(config, architecture.num_hidden_layers))
    return architecture


def _is_decoder_only(architecture: type) -> bool:
    # AutoModelForCausalLM also opens encoders (BERT, …) and encoder-decoders, whose tokens attend to later tokens.
    sees_later_tokens = (
        architecture in transformers.MODEL_FOR_MASKED_LM_MAPPING
        or architecture in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    )
    return architecture in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not sees_later_tokens


def _cut_layers(architecture: Any, num_layers: int) -> None:
    architecture.num_hidden_layers = num_layers
    if getattr(architecture, "layer_types", None):
        architecture.layer_types = architecture.layer_types[:num_layers]


def _read_weights(checkpoint: Checkpoint, architecture: Any, dtype: torch.dtype, head: bool) -> Any:
    """Load the model with its weights. Raises InputError if a file is damaged or a weight is missing.

    Without `head` the head's weights may be missing: they are then random.
    """
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            **checkpoint.arguments, config=architecture, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{checkpoint.folder}: unreadable weights ({_first_line(error)}); save the model again"
        ) from None
    # transformers gives missing weights random values.
    missing = sorted(key for key in report["missing_keys"] if head or key.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise InputError(
            f"{checkpoint.folder}: {len(missing)} weights are missing, such as {missing[0]}; save the model again"
        )
    return model


def _merge(model: Any, adapter: Checkpoint) -> Any:
    """Add the adapter's weights to the model's. Raises InputError if the adapter was made for another model."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise InputError(
            f"model.adapter={adapter.folder}: does not fit the model ({_first_line(error)}); give one trained on it"
        ) from None


def context_length(architecture: Any) -> int:
    """Return the model's maximum number of positions, or its sliding window if that is shorter."""
    positions = int(getattr(architecture, "max_position_embeddings", None) or sys.maxsize)
    if not getattr(architecture, "use_sliding_window", True):
        return positions
    return min(positions, getattr(architecture, "sliding_window", None) or positions)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers: it warns about the layers that `model.num_layers` leaves out on purpose."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
