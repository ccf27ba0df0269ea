"""Identities of models, and what is kept of them. The tests keep it in a folder for each of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import save_adapter, save_tiny, tiny_tokenizer

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import load_tokenizer, read_architecture, tokenizer_digest
from l2d_ray.models.checkpoint import find_model
from l2d_ray.models.identity import BackboneIdentity, identify, resolve_dtype

WITHOUT_PYTORCH = """
import sys
from l2d_ray.config import ModelConfig
from l2d_ray.models.identity import identify
for name in sys.argv[1:]:
    print(identify(ModelConfig(name=name, num_layers=1), "float32"))
print({"torch", "transformers"} & {*sys.modules})
"""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the descriptions that are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "l2d_ray" / "descriptions"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def as_transformers_reads(name: str) -> BackboneIdentity:
    """Return the identity of a model, cut to one layer, from the objects of transformers themselves."""
    config = ModelConfig(name=name, num_layers=1)
    checkpoint = find_model(config)
    architecture = read_architecture(checkpoint, config)
    return BackboneIdentity(
        base_model=checkpoint.digest(),
        num_layers=architecture.num_hidden_layers,
        adapter=None,
        tokenizer=tokenizer_digest(load_tokenizer(checkpoint)),
        dtype="float32",
        dimension=architecture.hidden_size,
    )


@pytest.mark.parametrize(
    ("dtype", "device", "resolved"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda", "bfloat16"),
        ("float16", "cuda", "float16"),
        ("int8", "cpu", "int8"),
    ],
)
def test_auto_dtype_depends_on_the_device(dtype: Any, device: str, resolved: str) -> None:
    assert resolve_dtype(ModelConfig(dtype=dtype), device) == resolved


def test_int8_is_refused_on_a_gpu() -> None:
    with pytest.raises(InputError, match="for CPUs only"):
        resolve_dtype(ModelConfig(dtype="int8"), "cuda")


def test_an_identity_covers_everything_that_decides_the_states(llama: str, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama)
    first = identify(ModelConfig(name=llama, adapter=adapter), "float32")
    assert identify(ModelConfig(name=llama, adapter=adapter), "float32") == first
    assert (first.num_layers, first.dimension, first.dtype) == (2, 32, "float32")
    other_adapter = identify(ModelConfig(name=llama, adapter=save_adapter(tmp_path / "a", llama, seed=1)), "float32")
    assert other_adapter.adapter not in (first.adapter, None)
    assert other_adapter.base_model == first.base_model
    assert identify(ModelConfig(name=llama), "float32").adapter is None
    cut = identify(ModelConfig(name=llama, num_layers=1), "bfloat16")
    assert (cut.num_layers, cut.dtype, cut.base_model) == (1, "bfloat16", first.base_model)
    other_weights = identify(ModelConfig(name=save_tiny(tmp_path / "w", seed=1)), "float32")
    assert other_weights.base_model != first.base_model
    assert other_weights.tokenizer == first.tokenizer
    tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path / "w")
    other_tokenizer = identify(ModelConfig(name=str(tmp_path / "w")), "float32")
    assert other_tokenizer.tokenizer != first.tokenizer
    assert other_tokenizer.base_model == other_weights.base_model


def test_an_identity_is_what_transformers_reads_and_the_next_time_needs_no_pytorch(tmp_path: Path) -> None:
    families = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "nanochat", "bloom", "lfm2")
    names = [save_tiny(tmp_path / family, family) for family in families]
    expected = [as_transformers_reads(name) for name in names]
    assert [identify(ModelConfig(name=name, num_layers=1), "float32") for name in names] == expected
    program = [sys.executable, "-c", WITHOUT_PYTORCH, *names]
    *identities, imported = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    assert identities == [str(one) for one in expected]
    assert imported == "set()"


def test_a_description_is_read_again_when_a_file_changed_or_it_is_damaged(llama: str, kept: Path) -> None:
    config = ModelConfig(name=llama)
    first = identify(config, "float32")
    (file,) = kept.iterdir()
    text = file.read_text()
    for damaged in ("", "{}", text.replace("}", ', "layers": 1}')):
        file.write_text(damaged)
        assert identify(config, "float32") == first
        assert file.read_text() == text
    settings = Path(llama) / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"pad_token": "<pad>"}))  # is added to the tokenizer
    assert identify(config, "float32").tokenizer != first.tokenizer
    settings.write_text(before)
    assert len([*kept.iterdir()]) == 2


def test_a_description_is_of_the_packages_that_read_the_files(
    llama: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identify(ModelConfig(name=llama), "float32")
    monkeypatch.setattr("l2d_ray.models.identity._version", lambda package: f"{package} of tomorrow")
    identify(ModelConfig(name=llama), "float32")
    assert len([*kept.iterdir()]) == 2


def test_a_model_is_identified_without_a_folder_for_what_is_kept(
    llama: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify(ModelConfig(name=llama), "float32")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert identify(ModelConfig(name=llama), "float32") == first


def test_too_many_layers_are_refused_alike_the_second_time(llama: str) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=r"^model.num_layers=3: .* has only 2 layers; give at most 2$"):
            identify(ModelConfig(name=llama, num_layers=3), "float32")
