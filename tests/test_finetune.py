import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_training import LEARNING, USERS, assert_same, train_in_this_process, weights
from support.small_workspace import config_of, refusal, write_dataset
from support.tiny_models import save_tiny, tiny_config, tiny_model, tiny_tokenizer

from l2d_ray.bench.finetune import bench_finetune
from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.evaluate import evaluate
from l2d_ray.distributed.training import driver
from l2d_ray.distributed.training.driver import FinetuneResult, finetune
from l2d_ray.distributed.training.worker import PADDED_BATCH_SIZE
from l2d_ray.errors import InputError
from l2d_ray.models.trainable import check_trained
from l2d_ray.schema import Split
from l2d_ray.stages.finetuning import SampleTable, Schedule
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def users() -> int:
    return USERS


def config(folder: Path, **overrides: Any) -> Config:
    return config_of(folder, **LEARNING | overrides)


@pytest.fixture(scope="module")
def tuned(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, FinetuneResult]:
    """Return a workspace with an adapter, and the result of its training."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(dataset, folder, dirs_exist_ok=True)
    return folder, finetune(config(folder))


def test_a_training_leaves_an_adapter_and_its_record(tuned: tuple[Path, FinetuneResult]) -> None:
    folder, result = tuned
    assert result.samples == 2 * 12 * 9
    assert result.epochs == 2
    assert 0 < result.distinct_tokens < result.tokens_one_by_one
    assert result.adapter == str(folder / "adapter")
    record = json.loads((folder / "adapter" / "training.json").read_text())
    first, second = record["losses"]
    assert second["train_loss"] < first["train_loss"] < np.log(400) + 1
    assert result.valid_loss == min(first["valid_loss"], second["valid_loss"])
    assert record["settings"]["finetune"]["learning_rate"] == 1e-2
    assert (folder / "adapter" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "adapter" / "tensorboard").glob("events.*"))
    assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").iterdir())


def test_the_same_command_again_trains_nothing(tuned: tuple[Path, FinetuneResult]) -> None:
    folder, result = tuned
    before = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert finetune(config(folder)) == result
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_the_result_of_another_training_is_not_overwritten(tuned: tuple[Path, FinetuneResult]) -> None:
    folder, _ = tuned
    with pytest.raises(InputError, match=r"training.json: belongs to another training: finetune.rank \(8, now 4\);"):
        finetune(config(folder, **{"finetune.rank": 4, "finetune.max_failures": 1}))
    other = save_tiny(folder / "other", seed=1)
    with pytest.raises(InputError, match=r"belongs to another training: another model or dataset; set"):
        finetune(config(folder, **{"model.name": other, "finetune.max_failures": 1}))


def test_a_memory_of_one_adapter_is_not_asked_with_another(tuned: tuple[Path, FinetuneResult]) -> None:
    folder, result = tuned
    settings = {"memory.units": 2, "evaluate.recommenders": '["l2d-global"]', "evaluate.fractions": "[]"}
    build_memory(config_of(folder, **settings, **{"model.adapter": result.adapter}))
    with pytest.raises(InputError, match=r"made with another adapter"):
        evaluate(config_of(folder, **settings, **{"model.adapter": "null"}))


def test_a_model_that_cannot_run_packed_trains_in_padded_batches(
    folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_this_process(monkeypatch)
    model = save_tiny(folder / "lfm2", "lfm2", layer_types=["full_attention", "conv"])
    settings = {"model.name": model, "finetune.method": "full", "finetune.micro_batch_size": 16}
    settings |= {"finetune.vocabulary": "catalogue"}
    result = finetune(config(folder, **settings))
    assert result.distinct_tokens == result.tokens_one_by_one
    assert capsys.readouterr().err.count("Lfm2ForCausalLM cannot run packed: ") == 1


def test_full_tuning_leaves_a_model_and_stops_when_validation_stops_improving(
    folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation targets are random, so memorising the training samples does not help.

    Two workers with sharded weights, whose driver is lost at the end, stop at the same epoch as one. DeepSpeed does not
    shard weights of up to 100,000 numbers, so the vocabulary is large.
    """
    changes = {"finetune.method": "full", "finetune.epochs": 12}
    changes |= {"model.name": save_tiny(folder / "wide", vocab_size=4000)}
    two = config(folder, **changes, **{"finetune.name": "two", "finetune.zero_stage": 3, "workers.max": 2})
    with monkeypatch.context() as lost:
        lost.setattr(driver, "_finish", None)
        with pytest.raises(TypeError):
            finetune(two)
    sharded = finetune(two)
    train_in_this_process(monkeypatch)
    result = finetune(config(folder, **changes))
    record = json.loads((folder / "adapter" / "training.json").read_text())
    assert sharded.epochs == result.epochs == record["best_epoch"] + 1 < 12
    assert any("embed_tokens" in name for name in weights(folder))
    assert_same(weights(folder, "two"), weights(folder), tolerance=2e-3)
    assert build_memory(config_of(folder, **{"model.name": result.adapter, "memory.units": 1})).rows == 108


@pytest.mark.parametrize(
    ("quantity", "norm", "size"), [("loss", 1e25, PADDED_BATCH_SIZE), ("gradient", 1e-25, 8)], ids=["loss", "gradient"]
)
def test_a_loss_or_gradient_that_is_not_finite_names_the_samples(
    folder: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, quantity: str, norm: float, size: int
) -> None:
    """A large norm and a large head make the loss infinite. After a small norm, the squared gradient overflows.

    Where the loss is infinite, every sample runs in full, in smaller micro-batches.
    """
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    with torch.no_grad():
        model.model.norm.weight *= norm
        model.lm_head.weight *= 1e25
    model.save_pretrained(folder / "steep")
    tiny_tokenizer().save_pretrained(folder / "steep")
    train_in_this_process(monkeypatch)
    settings = config(folder, **{"finetune.method": "full", "model.name": folder / "steep"})
    with pytest.raises(
        InputError, match=rf"the {quantity} is not finite in step 1, samples -?\d+, .*; lower"
    ) as caught:
        finetune(settings)
    _, *named = map(int, re.findall(r"-?\d+", str(caught.value).partition(";")[0]))
    table = SampleTable.read(Dataset.open(Workspace.open(str(folder))), Split.TRAIN, settings, None)
    schedule = Schedule(len(table), epochs=2, workers=1, batch_size=16, micro_batch_size=size)
    ((*parts,),) = next(schedule.divide(table, settings.finetune.seed))
    assert set(named) <= set(table.ids[np.concatenate(parts)].tolist())
    assert not (folder / "adapter" / "training.json").exists()


def test_the_benchmark_compares_the_same_gradients(dataset: Path, ray_session: None) -> None:
    """Two workers do not fit, so the benchmark leaves out their training, which other tests have."""
    settings = {"workers.cpus": 4, "bench.samples": 24, "bench.repeats": 1, "bench.threads": 1}
    result = bench_finetune(config(dataset, **settings))
    assert (result.samples, result.two_workers_over_one) == (24, None)
    assert result.gradient_error < 1e-4
    assert result.distinct_tokens < result.tokens_one_by_one
    assert min(result.speedup, result.samples_per_second, result.one_by_one_samples_per_second) > 0


def test_all_workers_stop_if_the_first_finds_an_empty_adapter(folder: Path, ray_session: None) -> None:
    with pytest.raises(InputError, match="the adapter came out empty"):
        finetune(config(folder, **{"finetune.learning_rate": 1e-60, "workers.max": 2}))


@pytest.mark.parametrize(
    ("lora_a", "lora_b", "message"),
    [
        (1.0, 0.0, "lora_B matrices are missing or zero"),
        (1.0, float("nan"), "lora_B.weight are empty or not finite"),
        (float("inf"), 1.0, "lora_A.weight are empty or not finite"),
    ],
)
def test_empty_and_infinite_weights_are_refused(lora_a: float, lora_b: float, message: str) -> None:
    state = {"q.lora_A.weight": torch.full((2, 3), lora_a), "q.lora_B.weight": torch.full((3, 2), lora_b)}
    with pytest.raises(InputError, match=message):
        check_trained(state, lora=True)
    with pytest.raises(InputError, match="empty"):
        check_trained({"q.lora_B.weight": torch.empty(0)}, lora=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetune.target_modules": '["q_proj","query"]'}, "no linear layer 'query'; choose from down_proj, "),
        ({"finetune.vocabulary": "catalogue", "finetune.zero_stage": 3}, "='catalogue' with finetune.zero_stage=3: it"),
        (
            {"finetune.vocabulary": "catalogue", "finetune.target_modules": '["q_proj","lm_head"]'},
            "finetune.vocabulary='catalogue' with 'lm_head' in finetune.target_modules: it reads",
        ),
        ({"finetune.offload": "true"}, "finetune.offload=true with finetune.zero_stage=0 and workers.gpus=0"),
        ({"model.dtype": "float16"}, "model.dtype='float16': a CPU cannot train in it"),
        ({"model.dtype": "int8"}, "model.dtype='int8': a CPU cannot train in it"),
        ({"model.dtype": "float16", "workers.gpus": 1}, "with finetune.zero_stage=0: DeepSpeed needs stage 1 to 3"),
        ({"model.adapter": "somewhere"}, "fine-tuning starts from a base model; leave the adapter out"),
        ({"workers.gpus": 0.5}, "workers.gpus=0.5: a training worker has one GPU"),
        ({"workers.max": 9}, "9 workers of workers.cpus=1 and workers.gpus=0 at once do not fit into 4 CPUs"),
        ({"finetune.trackers": '["wandb"]'}, "finetune.trackers='wandb': not installed; pip install wandb"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    change: dict[str, Any], message: str, dataset: Path, ray_session: None
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        finetune(config(dataset, **change))


def test_without_a_dataset_or_samples_in_it_the_remedy_is_named(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal("finetune", tmp_path, monkeypatch, capsys) == [
        f"error: {tmp_path}/dataset/dataset.json: not found; run jobs/prepare_data.py first"
    ]
    write_dataset(tmp_path, users=2, length=3)
    with pytest.raises(InputError, match="has 0 train samples; prepare more data"):
        finetune(config(tmp_path))
