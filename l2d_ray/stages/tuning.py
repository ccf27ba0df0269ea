"""Search for the settings of a recommender, without Ray: its trials, and the report of their results.

A trial is an ordinary training of a recommender `<name>-tune-<digest>`, with a folder and checkpoints. So the same
command goes on where a search was killed.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml

from l2d_ray.config import Config
from l2d_ray.errors import InputError
from l2d_ray.recommenders.trained import TrainingRecord
from l2d_ray.stages.training import plan_training


@dataclass(frozen=True)
class Trial:
    """One choice of settings."""

    name: str
    """Name of the recommender that is trained with it."""
    values: dict[str, Any]
    """Settings of `train` that are compared, by name."""
    config: Config

    def finished(self) -> TrainingRecord | None:
        """Return the record if this trial has ended."""
        return plan_training(self.config).finished()


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial."""

    name: str
    values: dict[str, Any]
    ndcg: float | None
    """NDCG@20 on the validation samples; None if the trial failed."""
    best_epoch: int
    epochs: int
    seconds: float
    error: str | None = None
    """The reason why it failed."""


def plan_trials(config: Config) -> list[Trial]:
    """Return `tune.trials` choices from the recommender's grid, or all. A setting that is given is not varied.

    The choice is random, and the same each time. Raises InputError as `plan_training` does, and for train.on_valid.
    """
    plan = plan_training(config)
    if config.train.on_valid:
        raise InputError("train.on_valid=true: validation samples that are trained on can choose nothing; leave it out")
    grid = {name: values for name, values in plan.trainer.grid.items() if f"train.{name}" not in config.given()}
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    chosen = np.random.default_rng(config.train.seed).permutation(len(every))[: config.tune.trials]
    return [_trial(config, every[number]) for number in sorted(chosen.tolist())]


def _trial(config: Config, values: dict[str, Any]) -> Trial:
    config = config.replace({f"train.{name}": value for name, value in values.items()})
    name = f"{config.recommender}-tune-{plan_training(config).run[:8]}"
    return Trial(name, values, config.replace({"recommender": name}))


def results_of(trials: Sequence[Trial], errors: Mapping[str, str]) -> list[TrialResult]:
    """Return the results of trials, best first, given the reasons why some failed, by name.

    Raises InputError if all failed.
    """
    results = []
    for trial in trials:
        record = None if trial.name in errors else trial.finished()
        if record is None:
            reason = errors.get(trial.name, "it did not end")
            results.append(TrialResult(trial.name, trial.values, None, 0, 0, 0.0, reason))
        else:
            ndcg = record.history[record.best_epoch - 1].ndcg
            found = (record.best_epoch, len(record.history), record.seconds)
            results.append(TrialResult(trial.name, trial.values, ndcg, *found))
    if all(result.ndcg is None for result in results):
        raise InputError(
            f"recommender={trials[0].name!r}: all trials failed: {results[0].error}; give other settings of train"
        )
    return sorted(results, key=lambda result: -1.0 if result.ndcg is None else result.ndcg, reverse=True)


def report_of(recommender: str, suffix: str = "json") -> str:
    """Return the path, in the workspace, of the report of a search; with `yaml`, of the settings it found."""
    return f"reports/tune-{recommender}.{suffix}"


def write_report(config: Config, results: Sequence[TrialResult]) -> tuple[str, str]:
    """Write `reports/tune-<recommender>.json` with all trials, and .yaml with the settings of the best one.

    Returns their paths in the workspace.
    """
    plan = plan_training(config)
    report, settings = report_of(config.recommender), report_of(config.recommender, "yaml")
    given = {key.removeprefix("train."): value for key, value in config.given().items() if key.startswith("train.")}
    best: dict[str, Any] = {"recommender": config.recommender, "train": given | results[0].values}
    for key in [key for key in plan.trainer.settings if key in config.given()]:
        section, _, name = key.partition(".")
        best.setdefault(section, {})[name] = config.given()[key]
    plan.workspace.write_json(report, {"best": best, "trials": [asdict(result) for result in results]})
    with plan.workspace.create(settings) as stream:
        stream.write(yaml.safe_dump(best, sort_keys=False).encode())
    return report, settings
