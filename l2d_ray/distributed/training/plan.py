"""The plan of a training, from the driver to its workers. It imports little, because Ray's controller reads it."""

from dataclasses import dataclass
from typing import Any

from ray.util.queue import Queue

from l2d_ray.core.packing import TrainingSamples
from l2d_ray.stages.finetuning import Schedule


@dataclass(frozen=True)
class WorkerPlan:
    """Everything a worker needs to know."""

    config: dict[str, Any]
    """The configuration, as plain values."""
    run: str
    """Name of the training (`finetuning.run_digest`)."""
    schedule: Schedule
    valid: list[TrainingSamples]
    """Micro-batches of validation samples."""
    messages: Queue | None
    """Messages of rank 0 to the driver (`monitor.Monitor`)."""
