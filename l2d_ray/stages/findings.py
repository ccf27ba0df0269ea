"""The findings of an evaluation: the report of its ranks, with costs, paired ratios and the searches behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.recommenders.contract import IndexKey
from l2d_ray.recommenders.fused import FusionRecord
from l2d_ray.stages.allowances import Allowance, allowances_of
from l2d_ray.stages.calibration import Calibration
from l2d_ray.stages.costs import Cost, costs_of
from l2d_ray.stages.evaluation import SAME_SAMPLES, Plan, Run, Share, Validation, report_path
from l2d_ray.stages.summary import ItemFrequencies, Metrics, PairedRatio, Row, changes_since, ratios_to, summarise
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class Report:
    """The findings of an evaluation."""

    plan: Plan
    indexes: Mapping[IndexKey, str]
    """Path of each index's manifest in the workspace."""
    validation: Validation
    results: list[Row]
    """A row for each recommender, over all test samples that it ran on."""
    same_users: list[Row]
    """A row for each recommender, over the samples of those that write text; empty if none does."""
    shares: list[tuple[Share, Row]]
    costs: dict[str, Cost]
    """Cost of each recommender before its first query, by name; not of those from another system (`file:`)."""
    ratios: list[PairedRatio]
    """Recall@20 of the reference over that of each other recommender; empty without a reference."""
    allowances: list[Allowance]
    """The search behind each recommender."""
    changes: Mapping[str, Metrics] = field(default_factory=dict)
    """Metrics of each recommender less those that it had in `evaluate.earlier_report`, by its name."""
    fusions: Mapping[str, FusionRecord] = field(default_factory=dict)
    """The weights of each fusion, by its name."""
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    """The calibration of each recommender whose scores are probabilities, by its name."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `reports/<evaluate.name>.json`."""
        return {
            "results": [row.to_json() | _cost(self.costs.get(row.recommender)) for row in self.results],
            "same_users": [row.to_json() for row in self.same_users],
            "ratios": [ratio.to_json() for ratio in self.ratios],
            "changes": {name: metrics.to_json() for name, metrics in self.changes.items()},
            "allowed": [asdict(allowance) for allowance in self.allowances],
            "fusions": {name: record.model_dump() for name, record in self.fusions.items()},
            "calibration": {name: one.to_json() for name, one in self.calibrations.items()},
            "validation": {
                "samples": len(self.plan.valid),
                "results": [trial.values | trial.row.to_json() for trial in self.validation.trials],
                "chosen": self.validation.choices,
            },
            "fractions": [
                {"recommender": share.name, "fraction": share.fraction, "recall@20": row.metrics.means["recall@20"]}
                for share, row in self.shares
            ],
            "indexes": {key.space: path for key, path in self.indexes.items() if key.fraction == 1},
            "config": self.plan.config.model_dump(mode="json"),
        }


def report(
    plan: Plan,
    indexes: Mapping[IndexKey, str],
    validation: Validation,
    runs: Sequence[Run],
    ranks: pa.Table,
    fusions: Mapping[str, FusionRecord],
) -> Report:
    """Summarise the ranks of `final_runs`. `fusions` has the weights of each fusion."""
    rows, *others = (rows_of(run, ranks, plan.frequencies) for run in runs)
    same_users = others[0] if others else []
    row_of = {row.recommender: row for row in [*same_users, *rows]}
    names = {one.name for one in plan.recommenders}
    silent = [one for one in plan.recommenders if not one.declaration.writes_text]
    return Report(
        plan=plan,
        indexes=indexes,
        validation=validation,
        results=[row_of[one.name] for one in plan.recommenders],
        same_users=same_users,
        shares=[(share, row_of[share.recommender.name]) for share in plan.shares(silent)],
        costs=costs_of(plan.recommenders, plan.config, indexes),
        ratios=_ratios(plan, runs, ranks),
        changes=_changes(plan, runs[0], ranks),
        allowances=allowances_of(plan, validation.choices, fusions),
        fusions=fusions,
        calibrations={
            one.name: Calibration.of(table)
            for one, table in zip(runs[0].recommenders, _tables(runs[0], ranks), strict=True)
            if one.options.log_probabilities and one.name in names
        },
    )


def rows_of(run: Run, ranks: pa.Table, frequencies: ItemFrequencies) -> list[Row]:
    """Return a row for each recommender of a run, given the ranks of all runs (`Evaluator.ranks`)."""
    tables = _tables(run, ranks)
    return [summarise(one.name, table, frequencies) for one, table in zip(run.recommenders, tables, strict=True)]


def _tables(run: Run, ranks: pa.Table) -> list[pa.Table]:
    """Return the ranks of each recommender of a run; those of a run are in the same order of samples."""
    of_run = ranks.filter(pa.compute.equal(ranks["run"], run.label))
    return [of_run.filter(pa.compute.equal(of_run["number"], number)) for number in range(len(run.recommenders))]


def _ratios(plan: Plan, runs: Sequence[Run], ranks: pa.Table) -> list[PairedRatio]:
    """Compare the reference with the others, each on the samples that both ran on."""
    reference, found = plan.reference, list[PairedRatio]()
    if reference is None:
        return found
    text = reference.declaration.writes_text
    for run in runs:
        same = run.label == SAME_SAMPLES
        others = [one.name for one in plan.recommenders if (text or one.declaration.writes_text) == same]
        if others:
            tables = dict(zip((one.name for one in run.recommenders), _tables(run, ranks), strict=True))
            found += ratios_to(reference.name, {name: tables[name] for name in [reference.name, *others]})
    return found


def _changes(plan: Plan, run: Run, ranks: pa.Table) -> dict[str, Metrics]:
    """Compare the recommenders of a run with an earlier report, if one is named."""
    name, workspace = plan.config.evaluate.earlier_report, Workspace.open(plan.config.workspace)
    if name is None:
        return {}
    path = workspace.path(report_path(name))
    earlier = pq.read_table(path, filesystem=workspace.filesystem, columns=["run", "recommender", "sample_id", "rank"])
    tables = zip((one.name for one in run.recommenders), _tables(run, ranks), strict=True)
    return changes_since(earlier, {name: table for name, table in tables if table.num_rows})


def _cost(cost: Cost | None) -> dict[str, Any]:
    return asdict(cost) if cost else {}
