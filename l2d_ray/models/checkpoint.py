"""Model folders: location, download and digest.

`model.name` and `model.adapter` may be a folder or its URI (s3://…), a GGUF file or a hub id; `model.name` may also be
`demo`. Weights are read from safetensors or GGUF only, because a pickle can run code. No code from a model repository
is ever run.
"""

import hashlib
import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from l2d_ray.config import ModelConfig
from l2d_ray.downloads import smollm2_gguf
from l2d_ray.errors import InputError, one_line
from l2d_ray.storage import LocalStorage
from l2d_ray.workspace import Workspace

TEXT_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
"""Configurations and tokenizers."""
HUB_FILES = ["*.safetensors", *TEXT_FILES]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights, configuration and tokenizer."""

    folder: Path
    gguf: str | None = None
    """Name of the GGUF file that holds all three; None for separate files."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained` that read this checkpoint."""
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True, **gguf}

    @property
    def files(self) -> list[Path]:
        """The weights, and the configurations that give them meaning."""
        weights = [self.gguf] if self.gguf else ["config.json", "adapter_config.json", "*.safetensors"]
        return sorted({file for pattern in weights for file in self.folder.glob(pattern)})

    @property
    def descriptions(self) -> list[Path]:
        """The files that describe the architecture and the tokenizer; a GGUF file may describe both itself."""
        return sorted(file for pattern in TEXT_FILES for file in self.folder.glob(pattern) if file.is_file())

    def digest(self) -> str:
        """Return the SHA-256 of the files."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def find_model(config: ModelConfig) -> Checkpoint:
    """Find the base model's checkpoint; download it if `model.name` is a hub id. Raises InputError if there is none."""
    if config.name == "demo":
        return Checkpoint(_demo_model())
    checkpoint = _find(config.name, "model.name")
    if checkpoint.gguf is None and not any(checkpoint.folder.glob("*.safetensors")):
        raise InputError(
            f"model.name={config.name!r}: no *.safetensors and no *.gguf file, and pickled weights are not read; save"
            " the model with save_pretrained first"
        )
    return checkpoint


def find_adapter(config: ModelConfig) -> Checkpoint | None:
    """Find the PEFT adapter's checkpoint. Returns None if no adapter is configured.

    Raises InputError if the adapter is missing or incomplete.
    """
    if config.adapter is None:
        return None
    checkpoint = _find(config.adapter, "model.adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (checkpoint.folder / file).exists():
            raise InputError(f"model.adapter={config.adapter!r}: no {file} there; give a folder that PEFT saved")
    return checkpoint


def mark_unquantised(model: Any) -> None:
    """Remove the quantisation settings of a model read from a GGUF file.

    transformers has dequantised its weights by then, but refuses to save a model that still carries these settings.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None


def _find(name: str, key: str) -> Checkpoint:
    """Find the checkpoint that the setting `key` names. Raises InputError if there is none."""
    path = _fetch(name, key) if "://" in name else Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{key}={name!r}: a file that is not *.gguf; give a folder, a hub id or a GGUF file")
        return Checkpoint(path.parent, path.name)
    if not path.is_dir():
        path = _download(name, key)
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise InputError(f"{key}={name!r}: holds {len(ggufs)} GGUF files; name one of them")
        return Checkpoint(path, ggufs[0].name)
    return Checkpoint(path)


def _fetch(uri: str, key: str) -> Path:
    """Return the folder at a URI: its path on a local disk, else a copy in the cache."""
    try:
        source = Workspace.open(uri)
        if isinstance(source.storage, LocalStorage):
            return Path(source.path(""))
        versions = source.storage.versions()
        if not versions:
            raise InputError("no file there")
        state = json.dumps([uri, versions], sort_keys=True)
        folder = user_cache_path("l2d_ray") / "fetched" / hashlib.sha256(state.encode()).hexdigest()[:16]
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                source.copy("", Workspace.open(temporary), folder.name)
                with suppress(OSError):  # another process copied it first
                    (Path(temporary) / folder.name).rename(folder)
    except (InputError, OSError) as error:
        raise InputError(f"{key}={uri!r}: cannot be fetched ({error}); give an existing folder or file") from None
    return folder


def _download(name: str, key: str) -> Path:
    """Download a model from the Hugging Face hub. Raises InputError if that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        reason = one_line(error)[:200]
        raise InputError(
            f"{key}={name!r}: no such folder, and it could not be fetched as a hub id ({type(error).__name__}:"
            f" {reason}); give an existing folder, or a hub id while online"
        ) from None


def _demo_model() -> Path:
    """Return a folder with SmolLM2-135M-Instruct as safetensors, made once: its GGUF file takes 20 s to read."""
    folder = user_cache_path("l2d_ray") / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    import torch  # not above: they take seconds, and most callers only look for files
    import transformers

    gguf = smollm2_gguf()
    checkpoint = Checkpoint(gguf.parent, gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(**checkpoint.arguments, dtype=torch.float32)
    mark_unquantised(model)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        converted = Path(temporary) / folder.name
        model.save_pretrained(converted)
        transformers.AutoTokenizer.from_pretrained(**checkpoint.arguments).save_pretrained(converted)
        if not folder.exists():
            converted.replace(folder)
    return folder
