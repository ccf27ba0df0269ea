"""Where the numbers of a training go while it runs: TensorBoard, and MLflow or Weights & Biases where they are asked
for and installed. Their own settings (server, project, key) are those of their environment variables."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from l2d_ray.errors import InputError

logger = logging.getLogger(__name__)
MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes numbers by name at a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note these numbers."""

    def close(self) -> None:
        """Write what is left."""


def open_trackers(names: Sequence[str], run: str, folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """A tracker for each name of MODULES. Raises InputError for one that is not installed."""
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
    """Note these numbers with each tracker. One that fails is told of on stderr and dropped: a training goes on."""
    for tracker in list(trackers):
        try:
            tracker.log(step, metrics)
        except Exception as error:  # what a server that is away makes of it is the tracker's own
            logger.warning("%s takes no more numbers: %s", type(tracker).__name__.strip("_"), error)
            trackers.remove(tracker)


class _TensorBoard:
    """Event files in `folder`, which may be of a run that is continued."""

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
        # By its id: for MLflow, a run is active in the thread that started it only.
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
