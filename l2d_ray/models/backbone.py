"""Loading: a decoder-only language model without its head, adapter merged in, ready to run."""

import hashlib
import json
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.checkpoint import Checkpoint, find_adapter, find_model, say_plain
from l2d_ray.models.int8_linear import quantize

_SEQ_TO_SEQ = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}
"""What stands between matrix products, by `model.dtype`; but for int8 the products, too."""


@dataclass(frozen=True)
class Backbone:
    """A model whose output is the last layer's hidden states, after the final norm: no language-model head."""

    model: nn.Module
    tokenizer: Any
    dimension: int
    """Size of a hidden state."""
    context_length: int
    """Tokens in the longest prompt it can read."""
    attention: str
    """The attention that transformers itself chose for it: sdpa, or eager where the model needs more."""
    dtype: str
    """As `model.dtype` names it, never auto."""
    device: torch.device


@dataclass(frozen=True)
class BackboneIdentity:
    """What decides the numbers that a backbone gives."""

    base_model: str
    """Digest of weights and configuration; of these the first `num_layers` layers are used."""
    num_layers: int
    adapter: str | None
    tokenizer: str
    dtype: str
    dimension: int


def resolve_dtype(config: ModelConfig, device: str) -> str:
    """`model.dtype` with `auto` decided: bfloat16 on a GPU, float32 on a CPU. Raises InputError for int8 on a GPU."""
    if device == "cuda" and config.dtype == "int8":
        raise InputError("model.dtype='int8': for CPUs only, but workers.gpus is above 0; leave it out")
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device == "cuda" else "float32"


def identify(config: ModelConfig, dtype: str) -> BackboneIdentity:
    """The identity of the model that `config` names, without loading its weights. Raises InputError."""
    checkpoint, adapter = find_model(config), find_adapter(config)
    architecture = read_architecture(checkpoint, config)
    return BackboneIdentity(
        base_model=checkpoint.digest(),
        num_layers=architecture.num_hidden_layers,
        adapter=adapter.digest() if adapter else None,
        tokenizer=_tokenizer_digest(load_tokenizer(checkpoint)),
        dtype=dtype,
        dimension=architecture.hidden_size,
    )


@dataclass(frozen=True)
class LanguageModel:
    """A backbone and the whole model it is the base of, which can also generate text."""

    backbone: Backbone
    model: Any
    """transformers' AutoModelForCausalLM; it shares the backbone's weights."""


def load_backbone(config: ModelConfig, dtype: str = "float32", device: str = "cpu") -> Backbone:
    """The model that `config` names, in evaluation mode. Raises InputError if there is none or it does not fit."""
    return _load(config, dtype, device, head=False).backbone


def load_language_model(config: ModelConfig, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """`load_backbone` with the language-model head, which stays on the CPU until the whole is moved.

    Raises InputError also if the head's weights are missing.
    """
    return _load(config, dtype, device, head=True)


def load_causal_model(config: ModelConfig, dtype: str, head: bool = True) -> Any:
    """transformers' AutoModelForCausalLM on the CPU, adapter merged in, its layers as transformers wrote them (for int8
    in float32).

    Raises InputError if there is none, if it does not fit, or if `head` is asked for and its weights are missing.
    """
    checkpoint, adapter = find_model(config), find_adapter(config)
    transformers.utils.logging.disable_progress_bar()
    with _no_chatter():
        model = _read_weights(checkpoint, read_architecture(checkpoint, config), DTYPES[dtype], head)
        if checkpoint.gguf:
            say_plain(model)
        return _merge(model, adapter) if adapter else model


def _load(config: ModelConfig, dtype: str, device: str, head: bool) -> LanguageModel:
    # Not above: it takes seconds, and a driver, which runs no model, does without.
    from l2d_ray.models.fused_layers import fuse_layers

    model = load_causal_model(config, dtype, head)
    architecture, checkpoint = model.config, find_model(config)
    base = model.base_model.to(device).eval().requires_grad_(False)
    if dtype == "int8":
        quantize(model if head else base)
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
    """The checkpoint's tokenizer. Raises InputError if it has none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**checkpoint.arguments, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint.folder}: no tokenizer that transformers can read: {_first_line(error)}"
        ) from None
    if not tokenizer.vocab_size:  # what transformers makes, for some families, of a folder without tokenizer files
        raise InputError(f"{checkpoint.folder}: no tokenizer in it; save the model's tokenizer there")
    return tokenizer


def read_architecture(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """The checkpoint's configuration, cut to `model.num_layers`. Raises InputError if it is no decoder-only model."""
    try:
        architecture = transformers.AutoConfig.from_pretrained(**checkpoint.arguments, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model.name={config.name!r}: {_first_line(error)}; give a model transformers knows") from None
    kind = type(architecture)
    # transformers also opens encoders (BERT, …) and encoder-decoders for causal use; their tokens see what follows.
    not_decoder_only = kind in transformers.MODEL_FOR_MASKED_LM_MAPPING or kind in _SEQ_TO_SEQ
    if kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or not_decoder_only:
        raise InputError(
            f"model.name={config.name!r}: {architecture.model_type!r} is no decoder-only language model; give one that"
            " transformers' AutoModelForCausalLM opens"
        )
    if config.num_layers is not None:
        if config.num_layers > architecture.num_hidden_layers:
            raise InputError(
                f"model.num_layers={config.num_layers}: {config.name} has only {architecture.num_hidden_layers} layers"
            )
        architecture.num_hidden_layers = config.num_layers
        if getattr(architecture, "layer_types", None):
            architecture.layer_types = architecture.layer_types[: config.num_layers]
    return architecture


def _read_weights(checkpoint: Checkpoint, architecture: Any, dtype: torch.dtype, head: bool) -> Any:
    """The model with its weights; without its head if need be. Raises InputError if a file is damaged or incomplete."""
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            **checkpoint.arguments, config=architecture, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{checkpoint.folder}: its weights cannot be read: {_first_line(error)}") from None
    # transformers fills in random numbers.
    missing = sorted(key for key in report["missing_keys"] if head or key.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise InputError(
            f"{checkpoint.folder}: {len(missing)} weights are missing, such as {missing[0]}; save it again"
        )
    return model


def _merge(model: Any, adapter: Checkpoint) -> Any:
    """The model with the adapter's weights added. Raises InputError if the adapter is for another model."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, UserWarning) as error:
        raise InputError(f"model.adapter={adapter.folder}: does not fit the model: {_first_line(error)}") from None


def context_length(architecture: Any) -> int:
    """Positions the model knows, or its sliding window if its layers look back only so far."""
    positions = int(getattr(architecture, "max_position_embeddings", None) or sys.maxsize)
    if not getattr(architecture, "use_sliding_window", True):
        return positions
    return min(positions, getattr(architecture, "sliding_window", None) or positions)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class _no_chatter:
    """transformers warns about the layers that a cut leaves out; the user asked for that."""

    def __enter__(self) -> None:
        self.level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self.level)
