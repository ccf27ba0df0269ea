"""Experiment trackers for fine-tuning: TensorBoard, MLflow and Weights & Biases.

Server, project and key come from each tracker's environment variables.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from l2d_ray.errors import InputError

logger = logging.getLogger(__name__)
MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """A receiver of metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics by name at a step."""

    def close(self) -> None:
        """Write everything that is still buffered."""


def open_trackers(names: Sequence[str], run: str, folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """Open a tracker for each name, a key of MODULES. Raises InputError if its package is not installed."""
    kinds: dict[str, Callable[..., Tracker]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _WeightsAndBiases,
    }
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError:
            raise InputError(f"finetune.trackers={name!r}: not installed; pip install {MODULES[name]}") from None
    return [kinds[name](run, folder, settings) for name in names]


def log_to(trackers: list[Tracker], step: int, metrics: Mapping[str, float]) -> None:
    """Record metrics in every tracker. A tracker that fails is removed with a line on stderr; training continues."""
    for tracker in list(trackers):
        try:
            tracker.log(step, metrics)
        except Exception as error:  # each tracker raises exceptions of another library
            name = type(tracker).__name__.strip("_")
            logger.warning("%s: failed (%s); training continues without it", name, error)
            trackers.remove(tracker)


class _TensorBoard:
    """Event files in `folder`, which may hold those of an interrupted run."""

    def __init__(self, run: str, folder: Path, settings: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, run: str, folder: Path, settings: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        self._run = mlflow.start_run(run_name=run).info.run_id
        mlflow.log_dict(settings, "settings.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # run_id is needed because MLflow's active run belongs to the thread that started it.
        self._mlflow.log_metrics(dict(metrics), step=step, run_id=self._run)

    def close(self) -> None:
        self._mlflow.end_run()


class _WeightsAndBiases:
    def __init__(self, run: str, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(id=run, name=run, resume="allow", config=settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
