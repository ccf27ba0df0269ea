"""Settings and results of a training of a tiny model on few samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from l2d_ray.distributed.serving.haproxy import free_ports
from support.small_workspace import wait_for

USERS = 12
LEARNING = {
    "finetune.learning_rate": 1e-2,
    "finetune.batch_size": 16,
    "finetune.micro_batch_size": 8,
    "finetune.epochs": 2,
    "finetune.valid_samples": 12,
    "finetune.dropout": 0,  # each worker would draw other numbers
}


def train_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray Train run the one worker of a fine-tuning here, in its local mode, which spares six actors."""
    monkeypatch.setattr("ray.train.torch.TorchTrainer", _trainer_without_workers)
    one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in (one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1).pop()}).items():
        monkeypatch.setenv(name, str(value))
    for of_an_earlier_training in ("deepspeed.comm.comm.cdb", "deepspeed.utils.groups._WORLD_GROUP"):
        monkeypatch.setattr(of_an_earlier_training, None)


def _trainer_without_workers(train: Callable[[Any], Any], **settings: Any) -> TorchTrainer:
    return TorchTrainer(train, **settings | {"scaling_config": ray.train.ScalingConfig(num_workers=0)})


def wait_for_checkpoint(folder: Path) -> None:
    """Wait until Ray Train has listed a checkpoint, which takes some seconds. Others do not count."""
    wait_for(lambda: any((folder / "checkpoints").glob("*/checkpoint_manager_snapshot.json")))


def weights(folder: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    """Return the weights that a training left in a workspace."""
    (file,) = (folder / name).glob("*model.safetensors")
    return load_file(file)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
