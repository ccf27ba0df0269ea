"""Training of a recommender in this process, with a progress bar. It needs no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from l2d_ray.config import Config
from l2d_ray.distributed.progress import Progress
from l2d_ray.recommenders.trained import Epoch, TrainingRecord, folder_of
from l2d_ray.stages.training import plan_training
from l2d_ray.stages.training import train as run_training


@dataclass(frozen=True)
class TrainResult:
    """Result of a training, with counts over all attempts."""

    recommender: str
    """Name of the recommender, for evaluate.recommenders."""
    samples: int
    """Training samples of an epoch."""
    epochs: int
    best_epoch: int
    """Number, from 1, of the epoch after which the weights were kept."""
    train_loss: float
    """Mean loss of a training sample during the best epoch."""
    valid_ndcg: float
    """NDCG@20 on the validation samples after the best epoch."""
    seconds: float
    """Seconds spent training and validating, over all attempts."""
    folder: str
    """Location of the weights and of training.json."""


def train(config: Config) -> TrainResult:
    """Train `recommender`, or finish training it. Raises InputError as `plan_training` and `training.train` do."""
    import torch  # it takes seconds, and a comparison imports this module without training

    plan = plan_training(config)
    torch.set_num_threads(config.workers.cpus)
    with Progress(plan.config.train.epochs, config.recommender, "epochs") as progress:

        def show(history: Sequence[Epoch]) -> None:
            if progress.done or not history:
                progress.advance(len(history) - progress.done, _note(history))
            else:
                progress.resume_at(len(history))

        record = run_training(plan, show)
    return result_of(record, plan.workspace.path(folder_of(record.recommender)))


def result_of(record: TrainingRecord, folder: str) -> TrainResult:
    """Return the result of a training that has ended."""
    best = record.history[record.best_epoch - 1]
    return TrainResult(
        recommender=record.recommender,
        samples=record.samples,
        epochs=len(record.history),
        best_epoch=record.best_epoch,
        train_loss=round(best.loss, 6),
        valid_ndcg=round(best.ndcg, 6),
        seconds=record.seconds,
        folder=folder,
    )


def _note(history: Sequence[Epoch]) -> str:
    if not history:
        return ""
    last, best = history[-1], max(epoch.ndcg for epoch in history)
    return f"loss {last.loss:.4g}, NDCG@20 {last.ndcg:.4f} (best {best:.4f})"
