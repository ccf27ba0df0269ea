"""The search behind each recommender of a report: how many configurations were compared, and by what.

Every choice is made on validation samples. A recommender that was trained keeps its best epoch by them, too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l2d_ray.recommenders.contract import Need
from l2d_ray.recommenders.fused import FusionRecord
from l2d_ray.recommenders.registry import MODULES, NamedRecommender
from l2d_ray.recommenders.trained import TrainingRecord, record_of
from l2d_ray.stages.tuning import report_of
from l2d_ray.workspace import Workspace

if TYPE_CHECKING:
    from l2d_ray.stages.evaluation import Plan

SEED = re.compile(r"-seed(\d+)$")
"""End of the name of a recommender that is trained with another seed."""


@dataclass(frozen=True)
class Allowance:
    """The search for the settings of a recommender."""

    recommender: str
    configurations: int | None
    """Configurations compared; 1 if there was no choice. None if the recommendations come from another system."""
    settings: list[str]
    """The settings that were varied, and `epoch` if the best one was kept."""
    samples: int = 0
    """Validation samples that each configuration was compared on."""
    measure: str = ""
    """Metric that decided."""
    seconds: float = 0.0
    """Seconds of training that the search took."""


def allowances_of(
    plan: "Plan", choices: Mapping[str, Mapping[str, float]], fusions: Mapping[str, FusionRecord]
) -> list[Allowance]:
    """Return the search of each recommender, in the order of the plan.

    `choices` are those of the validation, `fusions` the weights of each fusion.
    """
    return [
        Allowance(one.name, 1, ["weights"], fusions[one.name].samples, "cross-entropy")
        if one.name in fusions
        else _allowance(one, plan, choices)
        for one in plan.recommenders
    ]


def _allowance(one: NamedRecommender, plan: "Plan", choices: Mapping[str, Mapping[str, float]]) -> Allowance:
    if one.module == MODULES["file"]:
        return Allowance(one.name, None, [])
    if Need.TRAINED in one.needs:
        return _training(one.name, Workspace.open(plan.config.workspace))
    compared, settings = {one.options.chosen(choices)}, list[str]()
    for study in one.options.studies(plan.config):
        values = [getattr(trial, study.option) for trial in study.compared]
        found = {one.options.chosen(_with(choices, study.group, study.label, value)) for value in values}
        if len(found) > 1:
            compared |= found
            settings.append(study.option)
    writes_text, few = one.declaration.writes_text, plan.config.evaluate.generation_samples
    samples = len(plan.valid[:few] if writes_text else plan.valid)
    if not settings or not samples:
        return Allowance(one.name, 1, [])
    return Allowance(one.name, len(compared), settings, samples, "Recall@20")


def _training(name: str, workspace: Workspace) -> Allowance:
    """Return the search for a trained recommender: that of jobs/tune.py, if it has the settings that were found."""
    record = TrainingRecord.read(workspace, record_of(name))
    report = report_of(SEED.sub("", name))
    trials: list[dict[str, Any]] = workspace.read_json(report)["trials"] if workspace.exists(report) else []
    best: dict[str, Any] = trials[0]["values"] if trials else {}
    tuned = bool(best) and all(record.settings.get(f"train.{key}") == value for key, value in best.items())
    return Allowance(
        name,
        configurations=len(trials) if tuned else 1,
        settings=[*(best if tuned else ()), "epoch"],
        samples=record.valid_samples,
        measure="NDCG@20",
        seconds=round(sum(trial["seconds"] for trial in trials), 3) if tuned else 0.0,
    )


def _with(
    choices: Mapping[str, Mapping[str, float]], group: str, label: str, value: float
) -> dict[str, Mapping[str, float]]:
    """Return the choices with another value of one study."""
    return {**choices, group: {**choices.get(group, {}), label: value}}
