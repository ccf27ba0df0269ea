"""The plan of an evaluation: which recommenders run on which samples, and with which values of their options.

1. `plan_evaluation` checks the configuration and lists what runs.
2. `validation_runs` compare values of options, such as L2D's M, on validation samples. `choose` takes the best ones.
3. `final_runs` runs the recommenders with these values on test samples. Those that write text run on a part of the
   samples, in validation, too. All others run on this part of the test samples once more, so that all are compared on
   the same samples.

`Evaluator` does the runs, and `findings` reports them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.times import refreshes
from l2d_ray.data.dataset import SAMPLE_SPLITS, Dataset
from l2d_ray.data.samples import Sample, choose_samples, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import IndexKey, Options, Study
from l2d_ray.recommenders.registry import MODULES, NamedRecommender, declaration, find
from l2d_ray.schema import Split
from l2d_ray.stages.index_plan import plan_index, with_snapshot
from l2d_ray.stages.settings import check_data, for_evaluation
from l2d_ray.stages.summary import ItemFrequencies, Row
from l2d_ray.workspace import Workspace

SAME_SAMPLES = "test, same samples"
"""Label of the run of all recommenders on the samples of those that write text, in `reports/*.parquet`."""


def report_path(name: str) -> str:
    """Return the path of the ranks of a report."""
    return f"reports/{name}.parquet"


@dataclass(frozen=True)
class Run:
    """Recommenders to run on samples."""

    label: str
    recommenders: Sequence[NamedRecommender]
    samples: Sequence[Sample]


class Share(NamedTuple):
    """A recommender with an index of a share of the memory."""

    name: str
    """Name of the recommender without the share."""
    fraction: float
    recommender: NamedRecommender


@dataclass(frozen=True)
class Plan:
    """An evaluation before anything is built or run."""

    config: Config
    """Names the snapshot, if an index is needed."""
    recommenders: list[NamedRecommender]
    studies: dict[Study, str]
    """The module of each study. Those of recommenders that write text come last."""
    frequencies: ItemFrequencies
    """The training samples of each item."""
    valid: list[Sample]
    test: list[Sample]

    @property
    def indexes(self) -> list[IndexKey]:
        """The indexes that the recommenders search, those of the whole memory first."""
        return list(dict.fromkeys(key for one in self._options for key in one.indexes))

    @property
    def fitted(self) -> list[IndexKey]:
        """Those of them for which the parameters of the aggregation `posterior` must be fitted."""
        return list(dict.fromkeys(key for one in self._options for key in one.fitted))

    @property
    def _options(self) -> list[Options]:
        options = [trial for study in self.studies for trial in study.trials]
        options += [one.options for one in self.recommenders]
        options += [share.recommender.options for share in self.shares(self.recommenders)]
        return options

    @property
    def reference(self) -> NamedRecommender | None:
        """The recommender whose Recall@20 is divided by that of the others: `evaluate.reference`, or the first L2D."""
        wanted = self.config.evaluate.reference
        for one in self.recommenders:
            if one.name == wanted or (wanted is None and one.module == MODULES["l2d"]):
                return one
        return None

    def shares(self, recommenders: Sequence[NamedRecommender]) -> list[Share]:
        """Return the recommenders that are tested with shares of the memory, at each share."""
        return [
            Share(one.name, fraction, NamedRecommender(f"{one.name} of {fraction:g}", one.module, options))
            for fraction in sorted(set(self.config.evaluate.fractions))
            for one in recommenders
            if (options := one.options.at_fraction(fraction))
        ]


@dataclass(frozen=True)
class Trial:
    """The result of one value of a study on validation samples."""

    values: dict[str, float]
    """The options that its group of studies compares."""
    row: Row


@dataclass(frozen=True)
class Validation:
    """The choices of the validation."""

    choices: dict[str, dict[str, float]]
    """A value for each study, by its group and its label."""
    trials: list[Trial]


def plan_evaluation(config: Config) -> Plan:
    """Plan the evaluation of `evaluate.recommenders`, with the settings that the workspace records.

    Raises InputError for an unknown recommender or one that was not trained, if there is no dataset or no test sample,
    if a given setting contradicts the record, or if an index is needed and the memory does not belong to the dataset
    and the model. Also if times do not suffice for evaluate.memory=fresh, or if evaluate.earlier_report is missing.
    """
    config = for_evaluation(config)
    names = dict.fromkeys(config.evaluate.recommenders)
    recommenders = [find(name, config, "evaluate.recommenders") for name in names]
    workspace = Workspace.open(config.workspace)
    dataset = Dataset.open(workspace)
    check_data(config, dataset)
    if any(one.options.indexes for one in recommenders):
        config = with_snapshot(config)
        if config.evaluate.memory == "fresh":  # rows of validation and test samples are as many as those of the memory
            config = config.replace({"memory.sample_fraction": plan_index(config).snapshot.sample_fraction})
    test = choose_samples(dataset, Split.TEST, config.evaluate.samples)
    if not test:
        raise InputError(f"{workspace.path('dataset')}: no test samples; prepare the data with another data.split")
    earlier = config.evaluate.earlier_report
    if earlier and not workspace.exists(report_path(earlier)):
        raise InputError(
            f"{workspace.path(report_path(earlier))}: not found; run jobs/evaluate.py evaluate.name={earlier} first, or"
            " leave evaluate.earlier_report out"
        )
    if config.evaluate.memory == "fresh":
        _check_times(config, dataset, np.array([sample.timestamp for sample in test]))
    for one in recommenders:
        one.options.check(dataset, test)
        one.options.check_model(config, dataset)
    return Plan(
        config=config,
        recommenders=recommenders,
        studies={
            study: one.module
            for one in sorted(recommenders, key=lambda one: one.declaration.writes_text)
            for study in one.options.studies(config)
        },
        frequencies=ItemFrequencies.of(training_interactions(dataset).targets, len(dataset.items())),
        valid=choose_samples(dataset, Split.VALID, config.evaluate.samples),
        test=test,
    )


def validation_runs(plan: Plan) -> list[Run]:
    """Return the runs on validation samples of all values of the studies that compare several.

    Recommenders that write text have a run of their samples: the first `evaluate.generation_samples`.
    """
    few = plan.valid[: plan.config.evaluate.generation_samples]
    runs = []
    for label, writes_text, samples in (("validation", False, plan.valid), ("validation, text", True, few)):
        trials = [
            NamedRecommender(study.recommender, module, options)
            for study, module in plan.studies.items()
            if declaration(module).writes_text == writes_text
            for options in study.compared
        ]
        if trials and samples:
            runs.append(Run(label, trials, samples))
    return runs


def choose(plan: Plan, rows: Sequence[Row]) -> Validation:
    """Choose the best value of each study, given the rows of `validation_runs`; the defaults if there are no rows."""
    choices: dict[str, dict[str, float]] = {}
    trials, remaining = [], iter(rows)
    for study in plan.studies:
        results = list(zip(study.compared, remaining, strict=False))
        choices.setdefault(study.group, {})[study.label] = _best(study, results)
        compared = [other.option for other in plan.studies if other.group == study.group]
        trials += [Trial({name: getattr(options, name) for name in compared}, row) for options, row in results]
    return Validation(choices, trials)


def final_runs(plan: Plan, validation: Validation) -> list[Run]:
    """Return the runs of all recommenders, with the values that validation chose, on test samples."""
    chosen = [replace(one, options=one.options.chosen(validation.choices)) for one in plan.recommenders]
    silent = [one for one in chosen if not one.declaration.writes_text]
    runs = [Run("test", [*silent, *(share.recommender for share in plan.shares(silent))], plan.test)]
    if len(silent) < len(chosen):
        runs.append(Run(SAME_SAMPLES, chosen, plan.test[: plan.config.evaluate.generation_samples]))
    return runs


def _check_times(config: Config, dataset: Dataset, times: IntArray) -> None:
    """Raise InputError if no interaction is older than the refresh before any of these times of test samples."""
    history = training_interactions(dataset, SAMPLE_SPLITS)
    oldest, newest = int(history.timestamps.min()), int(history.timestamps.max())
    if refreshes(times, config.evaluate.refresh_days, newest).max() <= oldest:
        raise InputError(
            f"evaluate.memory='fresh': {dataset.workspace.path('dataset')} has no interaction before the day of a test"
            f" sample, with evaluate.refresh_days={config.evaluate.refresh_days}, as if its times were not known; use"
            " evaluate.memory=stale"
        )


def _best(study: Study, results: Sequence[tuple[Options, Row]]) -> float:
    if not results:
        return study.untested
    values = [(row.metrics.means["recall@20"], getattr(options, study.option)) for options, row in results]
    best: float = max(values, key=lambda result: (result[0], -result[1]))[1]
    return best
