"""The plan of a training, from the driver to its workers. It imports little, because Ray's controller reads it."""

from dataclasses import dataclass
from typing import Any

from ray.util.queue import Queue

from l2d_ray.stages.finetuning import SampleTable, Schedule


@dataclass(frozen=True)
class TrainingData:
    """Samples and titles. Ray keeps one copy on each node."""

    titles: list[str]
    train: SampleTable
    valid: SampleTable


@dataclass(frozen=True)
class WorkerPlan:
    """Everything a worker needs to know."""

    config: dict[str, Any]
    """The configuration, as plain values."""
    run: str
    """Name of the training (`finetuning.run_digest`)."""
    schedule: Schedule
    data: Any
    """A reference to `TrainingData`."""
    messages: Queue | None
    """Messages of rank 0 to the driver (`monitor.Monitor`)."""
