"""Search for the settings of a recommender with Ray Tune: one training on each worker."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune as ray_tune

from l2d_ray.config import Config
from l2d_ray.distributed.job import connect
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.workers import workers_that_fit
from l2d_ray.errors import InputError
from l2d_ray.recommenders.trained import Epoch
from l2d_ray.stages.training import plan_training, train
from l2d_ray.stages.tuning import Trial, plan_trials, results_of, write_report


@dataclass(frozen=True)
class TuneResult:
    """The best settings, and where all trials are described."""

    recommender: str
    trials: int
    failed: int
    """Trials whose loss was not finite, or that could not work for another reason."""
    best: dict[str, Any]
    """Settings of `train`, by name, of the best trial."""
    valid_ndcg: float
    """NDCG@20 of the best trial on the validation samples."""
    report: str
    """Location of the report of all trials."""
    settings: str
    """Location of a file for `jobs/train.py --config`."""


def tune(config: Config) -> TuneResult:
    """Train a recommender with every choice of settings that `plan_trials` makes, and compare them.

    Trials that have ended are not run again. Raises InputError as `plan_trials` does, and if every trial failed.
    """
    trials = plan_trials(config)
    due = [trial for trial in trials if not trial.finished()]
    with Progress(len(trials), f"trials of {config.recommender}", "trials") as progress:
        progress.resume_at(len(trials) - len(due))
        errors = _run(config, due, progress) if due else {}
    results = results_of(trials, errors)
    workspace = plan_training(config).workspace
    report, settings = (workspace.path(path) for path in write_report(config, results))
    best = results[0]
    failed = sum(result.ndcg is None for result in results)
    return TuneResult(config.recommender, len(trials), failed, best.values, best.ndcg or 0.0, report, settings)


def _run(config: Config, trials: list[Trial], progress: Progress) -> dict[str, str]:
    """Run trials, as many at once as there are workers. Return the reasons why some failed, by name."""
    connect(config)
    settings = [trial.config.model_dump(mode="json", exclude_unset=True) for trial in trials]
    train_one = ray_tune.with_parameters(_train_one, settings=settings)
    with tempfile.TemporaryDirectory() as folder:
        found = ray_tune.Tuner(
            ray_tune.with_resources(train_one, {"cpu": config.workers.cpus, "gpu": config.workers.gpus}),
            param_space={"number": ray_tune.grid_search(list(range(len(trials))))},
            tune_config=ray_tune.TuneConfig(max_concurrent_trials=config.workers.max or workers_that_fit(config)),
            run_config=ray_tune.RunConfig(storage_path=folder, verbose=0, callbacks=[_Count(progress)]),
        ).fit()
    for result in found:
        if result.error:
            raise result.error
    reasons = {trials[result.config["number"]].name: result.metrics.get("error") for result in found}
    return {name: str(reason) for name, reason in reasons.items() if reason}


def _train_one(parameters: dict[str, int], settings: list[dict[str, Any]]) -> None:
    """Run a trial in a worker. The workspace has its result; Ray Tune hears of its progress, and why it failed."""
    import torch  # it takes seconds, and the driver trains nothing

    config = Config(**settings[parameters["number"]])
    torch.set_num_threads(config.workers.cpus)

    def report(history: Sequence[Epoch]) -> None:
        if history:
            ray_tune.report({"ndcg": max(epoch.ndcg for epoch in history), "epochs": len(history)})

    try:
        train(plan_training(config), report)
    except InputError as error:
        ray_tune.report({"error": str(error)})


class _Count(ray_tune.Callback):  # type: ignore[misc]
    """Callback of Ray Tune that advances a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        """Leave the bar out of what Ray Tune stores of a search, which is not read again."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial."""
        self._progress.advance()
