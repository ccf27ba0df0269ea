"""The identity of a language model: everything that decides its hidden states, without loading its weights.

transformers alone can say what the files of a model mean, and its import takes seconds. So what it said is kept in the
user's cache folder, under a digest of these files: jobs that run no model themselves then do without it.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata

from platformdirs import user_cache_path

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.checkpoint import Checkpoint, find_adapter, find_model
from l2d_ray.workspace import Workspace

READERS = "transformers", "tokenizers", "gguf", "sentencepiece", "tiktoken", "mistral-common"
"""Packages that read a model's configuration and tokenizer. A description is of one version of each."""


@dataclass(frozen=True)
class BackboneIdentity:
    """Everything that decides the hidden states of a backbone."""

    base_model: str
    """Digest of the base model's weights and configuration."""
    num_layers: int
    """Number of layers in use, from the first."""
    adapter: str | None
    """Digest of the adapter; None without one."""
    tokenizer: str
    """Digest of the tokenizer."""
    dtype: str
    """A value of `model.dtype` other than auto."""
    dimension: int
    """Size of a hidden state."""


@dataclass(frozen=True)
class Description:
    """A model as its configuration and its tokenizer describe it, read by transformers."""

    num_layers: int
    """Number of layers of the whole model."""
    dimension: int
    """Size of a hidden state."""
    tokenizer: str
    """Digest of the tokenizer."""


def resolve_dtype(config: ModelConfig, device: str) -> str:
    """Return `model.dtype`, with `auto` replaced: by bfloat16 on a GPU, by float32 on a CPU.

    Raises InputError for int8 on a GPU.
    """
    if device == "cuda" and config.dtype == "int8":
        raise InputError("model.dtype='int8': for CPUs only, and workers.gpus is above 0; leave model.dtype out")
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device == "cuda" else "float32"


def identify(config: ModelConfig, dtype: str) -> BackboneIdentity:
    """Return the identity of the model that `config` names, without loading its weights.

    Raises InputError if the model or the adapter is missing or incomplete.
    """
    checkpoint, adapter = find_model(config), find_adapter(config)
    about = _describe(checkpoint, config)
    return BackboneIdentity(
        base_model=checkpoint.digest(),
        num_layers=layers_in_use(config, about.num_layers),
        adapter=adapter.digest() if adapter else None,
        tokenizer=about.tokenizer,
        dtype=dtype,
        dimension=about.dimension,
    )


def layers_in_use(config: ModelConfig, available: int) -> int:
    """Return `model.num_layers`, by default all that are available. Raises InputError if it is more."""
    if config.num_layers is None:
        return available
    if config.num_layers > available:
        raise InputError(
            f"model.num_layers={config.num_layers}: {config.name} has only {available} layers; give at most {available}"
        )
    return config.num_layers


def _describe(checkpoint: Checkpoint, config: ModelConfig) -> Description:
    """Return the description of a model: as it was kept, else as transformers reads it now."""
    cache, kept = Workspace.open(str(user_cache_path("l2d_ray"))), f"descriptions/{_digest(checkpoint)}.json"
    with suppress(OSError, InputError, TypeError):  # it is missing or damaged
        return Description(**cache.read_json(kept))
    from l2d_ray.models.backbone import load_tokenizer, read_architecture, tokenizer_digest

    architecture = read_architecture(checkpoint, config.model_copy(update={"num_layers": None}))
    about = Description(
        num_layers=architecture.num_hidden_layers,
        dimension=architecture.hidden_size,
        tokenizer=tokenizer_digest(load_tokenizer(checkpoint)),
    )
    with suppress(OSError):  # without a cache folder, it is read again the next time
        cache.write_json(kept, asdict(about))
    return about


def _digest(checkpoint: Checkpoint) -> str:
    """Return the digest of everything that decides a description: files and the packages that read them."""
    versions = {package: _version(package) for package in READERS}
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in checkpoint.descriptions}
    weights = checkpoint.digest() if checkpoint.gguf else None
    return hashlib.sha256(json.dumps([versions, files, checkpoint.gguf, weights]).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
