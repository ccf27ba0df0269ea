import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from support.s3_server import S3Server
from support.tiny_models import save_tiny, tiny_tokenizer

from l2d_ray.config import ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models import checkpoint
from l2d_ray.models.checkpoint import Checkpoint, find_adapter, find_model
from l2d_ray.workspace import Workspace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("model")))


def refusal(name: str | Path) -> str:
    """Return the error message for a model of this name."""
    with pytest.raises(InputError) as caught:
        find_model(ModelConfig(name=str(name)))
    return str(caught.value)


def test_a_folder_is_found(model: Path) -> None:
    assert find_model(ModelConfig(name=str(model))) == Checkpoint(model)


def test_a_local_folder_can_be_given_as_a_uri(model: Path) -> None:
    assert find_model(ModelConfig(name=model.as_uri())) == Checkpoint(model)


def test_a_remote_folder_is_copied_once_until_it_changes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    monkeypatch.setattr(checkpoint, "user_cache_path", lambda _: tmp_path / "cache")
    uri, local = s3.uri("model"), Workspace.open(str(model.parent))
    local.copy(model.name, Workspace.open(s3.uri("")), "model")
    config = ModelConfig(name=uri)
    first = find_model(config)
    assert first.digest() == Checkpoint(model).digest()
    assert find_model(config) == first
    with Workspace.open(uri).create("config.json") as stream:
        stream.write((model / "config.json").read_bytes() + b"\n")
    assert find_model(config).folder != first.folder
    none = s3.uri("none")
    assert refusal(none).startswith(f"model.name='{none}': cannot be fetched (no file there); give")


def test_a_gguf_file_is_found_by_its_name_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").touch()
    expected = Checkpoint(tmp_path, "small.gguf")
    assert find_model(ModelConfig(name=str(tmp_path / "small.gguf"))) == expected
    assert find_model(ModelConfig(name=str(tmp_path))) == expected
    assert expected.arguments["gguf_file"] == "small.gguf"


def test_safetensors_take_precedence_over_gguf_in_one_folder(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "small.gguf").touch()
    assert find_model(ModelConfig(name=str(tmp_path))) == Checkpoint(tmp_path)


def test_a_folder_with_two_gguf_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert refusal(tmp_path) == f"model.name='{tmp_path}': holds 2 GGUF files; name one of them"


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.txt"
    file.touch()
    assert refusal(file) == f"model.name='{file}': a file that is not *.gguf; give a folder, a hub id or a GGUF file"


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert refusal(tmp_path) == (
        f"model.name='{tmp_path}': no *.safetensors and no *.gguf file, and pickled weights are not read; save the"
        " model with save_pretrained first"
    )


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder", "no such name"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(name)
    assert message.startswith(f"model.name='{name}': no such folder, and it could not be fetched as a hub id (")
    assert message.endswith("; give an existing folder, or a hub id while online")
    assert "\n" not in message


def test_without_a_configured_adapter_there_is_none() -> None:
    assert find_adapter(ModelConfig()) is None


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter_is_refused(tmp_path: Path, missing: str) -> None:
    for file in {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} - {missing}:
        (tmp_path / file).touch()
    with pytest.raises(InputError) as caught:
        find_adapter(ModelConfig(adapter=str(tmp_path)))
    assert str(caught.value) == f"model.adapter='{tmp_path}': no {missing} there; give a folder that PEFT saved"


def test_the_digest_covers_weights_and_configuration(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    digest = Checkpoint(model).digest()
    assert Checkpoint(copy).digest() == digest
    (copy / "README.md").write_text("words")
    assert Checkpoint(copy).digest() == digest
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    changed = Checkpoint(copy).digest()
    assert changed != digest
    save_tiny(copy, seed=1)
    assert Checkpoint(copy).digest() not in (digest, changed)


def test_the_digest_of_a_gguf_file_covers_that_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"a")
    digest = Checkpoint(tmp_path, "a.gguf").digest()
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint(tmp_path, "a.gguf").digest() == digest
    file.write_bytes(b"b")
    assert Checkpoint(tmp_path, "a.gguf").digest() != digest


@pytest.mark.embedded
def test_the_demo_model_is_a_folder_of_safetensors() -> None:
    checkpoint = find_model(ModelConfig())
    assert checkpoint.gguf is None
    assert (checkpoint.folder / "model.safetensors").stat().st_size > 500_000_000
