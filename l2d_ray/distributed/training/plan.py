"""What the driver and the workers of a training agree on. Imports little: Ray's controller reads it, too."""

from dataclasses import dataclass
from typing import Any

from ray.util.queue import Queue

from l2d_ray.core.packing import TrainingSamples
from l2d_ray.stages.finetuning import Schedule


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker is told."""

    config: dict[str, Any]
    run: str
    """`finetuning.run_digest`."""
    schedule: Schedule
    valid: list[TrainingSamples]
    """Micro-batches of validation samples."""
    progress: Queue | None
    """Takes what rank 0 has to say of each step (`step`, `samples`, `distinct_tokens`, `seconds`, `metrics`), and lines
    of text for stderr."""


def best_folder(run: str, epoch: int) -> str:
    """Where in the workspace the weights of the best epoch so far are kept."""
    return f"checkpoints/{run}/best-{epoch}"
