"""The evaluation on Ray Data: validation chooses values of options, test samples measure every recommender with them.

`stages.evaluation` plans and reports. Here the indexes are built, with evaluate.memory=fresh the rows of validation and
test samples, too, and a pool of actors runs the recommenders.

Every actor holds its indexes as a whole: FAISS's part and the item means are in memory. Rows stay on the disk if the
nodes share one, and are read into memory from an object store. Where a node has no room for that,
`index.sample_fraction` evaluates a share of the memory. Serving needs no such node.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from l2d_ray.config import Config
from l2d_ray.data.samples import Sample
from l2d_ray.distributed.build_index import ensure_index
from l2d_ray.distributed.build_memory import build_held_out
from l2d_ray.distributed.posterior import ensure_posterior
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.rounds import in_rounds
from l2d_ray.distributed.screen import show
from l2d_ray.distributed.tasks import run_tasks
from l2d_ray.distributed.workers import actor_pool, worker_options
from l2d_ray.errors import InputError
from l2d_ray.index.engine import engine
from l2d_ray.recommenders.contract import IndexKey
from l2d_ray.recommenders.fused import FusionRecord
from l2d_ray.recommenders.registry import NamedRecommender
from l2d_ray.stages.evaluation import (
    Plan,
    Run,
    Validation,
    choose,
    final_runs,
    plan_evaluation,
    validation_runs,
)
from l2d_ray.stages.evaluator import Columns, Evaluator
from l2d_ray.stages.findings import Report, report, rows_of
from l2d_ray.stages.fusion import fit_fusions
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.reports import plot, png, table
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class EvaluateResult:
    """The location of the report, and its table."""

    report: str
    """Location of the JSON report. The plots (.png) and the rank of every target (.parquet) are next to it."""
    results: list[dict[str, Any]]
    """One row per recommender, over all test samples that it ran on."""
    ratios: list[dict[str, Any]]
    """Recall@20 of the reference over that of each other recommender, with its interval, and whether it is above 1."""
    changes: dict[str, Any]
    """Metrics of each recommender less those that it had in `evaluate.earlier_report`, with paired intervals."""
    calibration_error: dict[str, float]
    """Expected calibration error of the first 20 items, of each recommender whose scores are probabilities."""
    top_m: float | None
    """M that validation chose for L2D-L in index.space, for recommend.top_m; None without L2D."""
    prior: float | None
    """Prior that validation chose for L2D-G in index.space, for index.prior; None without L2D. `+prior` has it."""
    seconds: float


def evaluate(config: Config) -> EvaluateResult:
    """Evaluate `evaluate.recommenders`, and print the tables. Raises InputError as `measure` does."""
    started = time.monotonic()
    found, location = measure(config)
    _print(found)
    chosen = found.validation.choices.get(found.plan.config.index.space, {})
    return EvaluateResult(
        report=location,
        results=[
            {key: value for key, value in row.to_json().items() if key not in ("intervals", "groups")}
            for row in found.results
        ],
        ratios=[ratio.to_json() for ratio in found.ratios],
        changes={name: metrics.to_json() for name, metrics in found.changes.items()},
        calibration_error={name: round(one.listed.error, 5) for name, one in found.calibrations.items()},
        top_m=chosen.get("top_m"),
        prior=chosen.get("prior"),
        seconds=round(time.monotonic() - started, 3),
    )


def measure(config: Config) -> tuple[Report, str]:
    """Evaluate `evaluate.recommenders`, and return the findings and the location of the JSON report.

    Missing indexes are built; `reports/<evaluate.name>.*` is written. Raises InputError as `plan_evaluation`,
    `ensure_index` and `ensure_posterior` do.
    """
    plan = plan_evaluation(config)
    indexes = {key: _build(plan.config, key, key in plan.fitted) for key in plan.indexes}
    if indexes and plan.config.evaluate.memory == "fresh":
        build_held_out(plan.config)
    validation = _validate(plan, indexes)
    fusions = _fit_fusions(plan, indexes)
    runs = final_runs(plan, validation)
    ranks = _ranks(plan, indexes, runs)
    found = report(plan, indexes, validation, runs, ranks, fusions)
    return found, _write(found, ranks)


def _build(config: Config, key: IndexKey, fitted: bool) -> str:
    """Build an index if it is missing, with its parameters if `fitted`, and return the path of its manifest."""
    fraction = key.fraction * config.index.sample_fraction
    config = config.replace({"index.space": key.space, "index.sample_fraction": fraction})
    try:
        ensure_index(config)
    except InputError as error:
        if key.fraction == 1:
            raise
        raise InputError(f"{error}; or leave {key.fraction:g} out of evaluate.fractions") from None
    if fitted:
        ensure_posterior(config)
    return plan_index(config).manifest


def _fit_fusions(plan: Plan, indexes: Mapping[IndexKey, str]) -> dict[str, FusionRecord]:
    """Fit the weights of all fusions that are not fitted yet, and return them by name."""
    fusions = [one for one in plan.recommenders if one.options.parts]
    calls = [(plan.config, fusions, indexes)] if fusions else []
    records = run_tasks("weights of fusions", plan.config, fit_fusions, calls, gpus=plan.config.workers.gpus)
    return dict(zip((one.name for one in fusions), chain(*records), strict=True))


def _validate(plan: Plan, indexes: Mapping[IndexKey, str]) -> Validation:
    """Run what is to be compared on validation samples, if there is anything, and choose."""
    runs = validation_runs(plan)
    ranks = _ranks(plan, indexes, runs) if runs else None
    return choose(plan, [row for run in runs for row in rows_of(run, ranks, plan.frequencies)])


def _ranks(plan: Plan, indexes: Mapping[IndexKey, str], runs: Sequence[Run]) -> pa.Table:
    """Run recommenders on a pool of actors, and return the rows of `Evaluator.ranks`."""
    rows = [_row(run, sample) for run in runs if run.recommenders for sample in run.samples]
    if plan.config.evaluate.memory == "fresh":
        rows.sort(key=lambda row: row["timestamp"])  # so that actors go forward in time
    samples = {(row["run"], row["sample_id"]): row for row in rows}
    blocks = []
    with Progress(sum(len(run.samples) * len(run.recommenders) for run in runs), runs[0].label, "ranks") as progress:
        for block in in_rounds(samples, lambda missing: _run(plan.config, indexes, runs, missing)):
            blocks.append(block)
            progress.advance(len(block))
    return pa.concat_tables(blocks).sort_by([(name, "ascending") for name in ("run", "sample_id", "number")])


def _run(
    config: Config, indexes: Mapping[IndexKey, str], runs: Sequence[Run], samples: list[dict[str, Any]]
) -> Iterator[tuple[set[tuple[str, int]], pa.Table]]:
    """Run recommenders on these samples in one pass of Ray Data; yield the ranks of some, and which these are."""
    size = config.evaluate.batch_size
    batches = -(-len(samples) // size)
    outcomes = ray.data.from_items(samples, override_num_blocks=batches).map_batches(
        _EvaluationActor,
        batch_size=size,
        compute=actor_pool(config, batches),
        **worker_options(config),
        fn_constructor_args=(config, {run.label: run.recommenders for run in runs}, indexes),
    )
    for block in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield set(zip(block["run"].to_pylist(), block["sample_id"].to_pylist(), strict=True)), block


def _row(run: Run, sample: Sample) -> dict[str, Any]:
    """Return a sample as a row of a Ray data set."""
    return {
        "run": run.label,
        "sample_id": sample.sample_id,
        "user_hash": sample.user_hash,
        "history": sample.history.tolist(),
        "target": sample.target,
        "timestamp": sample.timestamp,
    }


class _EvaluationActor:
    """An `Evaluator` that Ray Data calls."""

    def __init__(
        self, config: Config, runs: Mapping[str, Sequence[NamedRecommender]], indexes: Mapping[IndexKey, str]
    ) -> None:
        import torch  # it takes seconds, and the driver runs no model

        torch.set_num_threads(config.workers.cpus)
        engine.set_threads(config.workers.cpus)
        self._evaluator = Evaluator(config, runs, indexes)

    def __call__(self, samples: Columns) -> pa.Table:
        return pa.table(self._evaluator.ranks(samples))


def _write(found: Report, ranks: pa.Table) -> str:
    """Write the report, its plots and the ranks, and return the location of the report."""
    config = found.plan.config
    workspace, path = Workspace.open(config.workspace), f"reports/{config.evaluate.name}"
    workspace.write_json(f"{path}.json", found.to_json())
    with workspace.create(f"{path}.png") as stream:
        stream.write(png(plot(found)))
    with workspace.create(f"{path}.parquet") as stream:
        pq.write_table(
            ranks.drop_columns(["number", "top", "log_probabilities", "seconds", "tokens"]), stream, compression="zstd"
        )
    return workspace.path(f"{path}.json")


def _print(found: Report) -> None:
    for title, rows in (("test", found.results), ("test, all on the same samples", found.same_users)):
        if rows:
            show(f"\n{title}\n{table(rows)}")
    show(
        "dense, sparse, cold: Recall@20 of targets with more training samples than the median, fewer, and none; head,"
        " tail: of the most popular items, and the others; coverage: share of the catalogue in any user's first 20"
    )
