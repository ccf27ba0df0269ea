"""Settings and results of a training of a tiny model on few samples."""

from pathlib import Path

import torch
from safetensors.torch import load_file

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
