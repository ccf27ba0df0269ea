"""An evaluation in this process, without Ray."""

import numpy as np
import pyarrow as pa

from l2d_ray.recommenders.contract import IndexKey
from l2d_ray.stages.evaluation import (
    Plan,
    Run,
    choose,
    final_runs,
    validation_runs,
)
from l2d_ray.stages.evaluator import Evaluator
from l2d_ray.stages.findings import Report, report, rows_of
from l2d_ray.stages.fusion import fit_fusions


def rank(plan: Plan, runs: list[Run], indexes: dict[IndexKey, str]) -> pa.Table:
    """Return the ranks of all runs, in one process and one batch for each run."""
    evaluator = Evaluator(plan.config, {run.label: run.recommenders for run in runs}, indexes)
    tables = []
    for run in runs:
        samples = {
            name: np.array([getattr(s, name) for s in run.samples])
            for name in ("sample_id", "user_hash", "target", "timestamp")
        }
        histories = np.empty(len(run.samples), object)
        histories[:] = [sample.history for sample in run.samples]
        labels = np.repeat(run.label, len(run.samples))
        tables.append(pa.table(evaluator.ranks({"run": labels, "history": histories, **samples})))
    return pa.concat_tables(tables)


def evaluate(plan: Plan, indexes: dict[IndexKey, str]) -> Report:
    """Go all the way from a plan to a report."""
    compared = validation_runs(plan)
    rows = [row for run in compared for row in rows_of(run, rank(plan, [run], indexes), plan.frequencies)]
    validation = choose(plan, rows)
    fused = [one for one in plan.recommenders if one.options.parts]
    records = fit_fusions(plan.config, fused, indexes) if fused else []
    fusions = dict(zip((one.name for one in fused), records, strict=True))
    runs = final_runs(plan, validation)
    return report(plan, indexes, validation, runs, rank(plan, runs, indexes), fusions)
