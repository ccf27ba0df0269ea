"""The evaluation, with Ray Data: validation chooses, test reports.

Two passes over samples, each on a pool of actors that hold the models and the indexes: validation samples run through
L2D at every M and prior of the configuration, whose best go into the test pass. Recommenders that write text see a part
of the test samples only, and all the others are run on that part once more, beside them, for a fair comparison: that
is a second `Run` of the same pass.

Every actor holds its indexes as a whole (FAISS's part and the item means; rows stay on a disk that nodes share, and are
read into memory from an object store). Where a node has no room for that, `index.sample_fraction` evaluates a share of
the memory; serving needs no such node.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.build_index import ensure_index
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.screen import show
from l2d_ray.distributed.workers import actor_pool
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.engine import engine
from l2d_ray.records import check_query
from l2d_ray.schema import Split
from l2d_ray.stages.evaluation import (
    Choice,
    Contender,
    Stand,
    contender,
    groups_of,
    samples_of,
    spaces_of,
    summarise,
    training_pairs,
)
from l2d_ray.stages.index_plan import dataset_of, plan_index
from l2d_ray.stages.reports import plot, png, table
from l2d_ray.stages.settings import check_data, for_evaluation
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class EvaluateResult:
    """Where the report is, and its table."""

    report: str
    """Location of the JSON report; the plots (.png) and the rank of every target (.parquet) lie beside it."""
    results: list[dict[str, Any]]
    """One row a recommender, over all test samples that it ran on."""
    top_m: int | None
    """M that validation chose for L2D-L in index.space, if any L2D took part: for recommend.top_m."""
    prior: float | None
    """Likewise for L2D-G: for index.prior. `+prior` has it already."""
    seconds: float


@dataclass(frozen=True)
class Run:
    """Contenders on samples."""

    label: str
    contenders: list[Contender]
    samples: list[dict[str, Any]]
    """As of `evaluation.samples_of`."""


def evaluate(config: Config) -> EvaluateResult:
    """Evaluate `evaluate.recommenders`, building the indexes that are missing; leave `reports/<evaluate.name>.*`.

    Raises InputError if there is no dataset or model, or no memory where L2D takes part, or if they do not belong
    together.
    """
    started = time.monotonic()
    workspace = Workspace.open(config.workspace)
    config = for_evaluation(config)
    dataset = Dataset.open(workspace)
    check_data(config, dataset)
    names = list(dict.fromkeys(config.evaluate.recommenders))
    spaces = spaces_of(names, config)
    for name in names:  # an unknown name is refused before anything is built
        contender(name, config, dict.fromkeys(spaces, Choice("", 0, 0)))
    if spaces:
        config = _pinned(config)
    test = samples_of(dataset, Split.TEST, config.evaluate.samples)
    if not test:
        raise InputError(f"{workspace.path('dataset')}: has no test samples; prepare data with another data.split")
    indexes = {space: _index(config, space) for space in spaces}
    shares = {
        share: _index_of_share(config, share)
        for share in (sorted(set(config.evaluate.fractions)) if {"l2d-global", "l2d-local"} & set(names) else [])
    }

    valid = samples_of(dataset, Split.VALID, config.evaluate.samples)
    targets = training_pairs(dataset)[1]
    choices, tried = _choose(config, indexes, valid, targets)
    contenders = [contender(name, config, choices) for name in names]
    silent = [one for one in contenders if not one.generates]
    of_shares = [
        replace(one, name=f"{one.name} of {share:g}", index=index, fraction=share)
        for share, index in shares.items()
        for one in silent
        if one.name in ("l2d-global", "l2d-local")
    ]
    runs = [Run("test", [*silent, *of_shares], test)]
    if len(silent) < len(contenders):
        runs.append(Run("test, beside those that write", contenders, test[: config.evaluate.generation_samples]))
    ranks = _ranks(config, runs)
    rows, *beside = _rows(runs, ranks, targets)
    same_users = beside[0] if beside else []
    table_rows = {row["recommender"]: row for row in [*same_users, *rows]}
    results = [table_rows[name] for name in names]

    report = {
        "results": results,
        "same_users": same_users,
        "validation": {
            "samples": len(valid),
            "results": tried,
            "chosen": {space: {"top_m": choice.top_m, "prior": choice.prior} for space, choice in choices.items()},
        },
        "fractions": [
            {"recommender": one.kind, "fraction": one.fraction, "recall@20": row["recall@20"]}
            for one, row in zip(of_shares, rows[len(silent) :], strict=True)
        ],
        "indexes": indexes,
        "config": config.model_dump(mode="json"),
    }
    path = f"reports/{config.evaluate.name}"
    workspace.write_json(f"{path}.json", report)
    with workspace.create(f"{path}.png") as stream:
        stream.write(png(plot(report)))
    with workspace.create(f"{path}.parquet") as stream:
        pq.write_table(ranks.drop_columns(["number", "seconds", "tokens"]), stream, compression="zstd")
    for title, lines in (("test", results), ("test, all on the same samples", same_users)):
        if lines:
            show(f"\n{title}\n{table(lines)}")
    return EvaluateResult(
        report=workspace.path(f"{path}.json"),
        results=[{key: row[key] for key in row if key not in ("intervals", "groups")} for row in results],
        top_m=choices[config.index.space].top_m if choices else None,
        prior=choices[config.index.space].prior if choices else None,
        seconds=round(time.monotonic() - started, 3),
    )


def _choose(
    config: Config, indexes: dict[str, str], valid: list[dict[str, Any]], targets: NDArray[np.integer]
) -> tuple[dict[str, Choice], list[dict[str, Any]]]:
    """By space, the M and the prior of the best validation Recall@20 (of equals the smaller); and a row for everything
    that was tried, with its `top_m` and `prior`."""
    default = {
        space: Choice(index, config.recommend.top_m, config.index.prior_in(space)) for space, index in indexes.items()
    }
    if not valid or not indexes:
        return default, []
    tried = {
        space: [
            Contender(f"l2d-local-{space}", "l2d-local", index, top_m=top_m, prior=config.index.prior_in(space))
            for top_m in sorted(set(config.evaluate.top_m), reverse=True)  # one search finds them all
        ]
        + [
            Contender(f"l2d-global-{space}", "l2d-global", index, prior=prior)
            for prior in sorted(set(config.evaluate.priors))
        ]
        for space, index in indexes.items()
    }
    everything = [one for own in tried.values() for one in own]
    runs = [Run("validation", everything, valid)]
    (rows,) = _rows(runs, _ranks(config, runs), targets)
    found = {one: row["recall@20"] for one, row in zip(everything, rows, strict=True)}

    def best(space: str, kind: str) -> Contender:
        of_kind = (one for one in tried[space] if one.kind == kind)
        return max(of_kind, key=lambda one: (found[one], -one.top_m, -one.prior))

    choices = {
        space: Choice(index, best(space, "l2d-local").top_m, best(space, "l2d-global").prior)
        for space, index in indexes.items()
    }
    return choices, [{"top_m": one.top_m, "prior": one.prior} | row for one, row in zip(everything, rows, strict=True)]


def _pinned(config: Config) -> Config:
    """The configuration with its snapshot named, which must be of the workspace's dataset and of this model."""
    plan = plan_index(config)
    dataset_of(plan)
    snapshot = plan.snapshot
    check_query(snapshot.identity, identify_memory(config))
    return config.replace({"index.snapshot": snapshot.number})


def _index(config: Config, space: str, fraction: float | None = None) -> str:
    """The path of the manifest of an index, which is built if it is missing."""
    changes: dict[str, Any] = {"index.space": space}
    if fraction is not None:
        changes["index.sample_fraction"] = fraction
    config = config.replace(changes)
    ensure_index(config)
    return plan_index(config).manifest


def _index_of_share(config: Config, share: float) -> str:
    try:
        return _index(config, config.index.space, share * config.index.sample_fraction)
    except InputError as error:
        raise InputError(f"{error}; or leave {share:g} out of evaluate.fractions") from None


def _ranks(config: Config, runs: Sequence[Run]) -> pa.Table:
    """Every rank of every run, as EvaluationActor gives them."""
    size = config.evaluate.batch_size
    samples = [{"run": run.label} | sample for run in runs if run.contenders for sample in run.samples]
    batches = -(-len(samples) // size)
    contenders = {run.label: [asdict(one) for one in run.contenders] for run in runs}
    outcomes = ray.data.from_items(samples, override_num_blocks=batches).map_batches(
        EvaluationActor,
        batch_size=size,
        compute=actor_pool(config, batches),
        num_cpus=config.workers.cpus,
        num_gpus=config.workers.gpus,
        fn_constructor_args=(config.model_dump(mode="json"), contenders),
    )
    total = sum(len(run.samples) * len(run.contenders) for run in runs)
    blocks = []
    with Progress(total, runs[0].label, "ranks") as bar:
        for block in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
            blocks.append(block)
            bar.advance(len(block))
    return pa.concat_tables(blocks)


def _rows(runs: Sequence[Run], ranks: pa.Table, training_targets: Any) -> list[list[dict[str, Any]]]:
    """For each run, a row for each of its contenders (`evaluation.summarise`)."""
    rows = []
    for run in runs:
        of_run = ranks.filter(pa.compute.equal(ranks["run"], run.label))
        rows.append([_row(one.name, number, of_run, training_targets) for number, one in enumerate(run.contenders)])
    return rows


def _row(name: str, number: int, ranks: pa.Table, training_targets: Any) -> dict[str, Any]:
    own = ranks.filter(pa.compute.equal(ranks["number"], number))
    column = {key: own[key].to_numpy() for key in ("target", "rank", "user_hash", "seconds", "tokens")}
    return summarise(
        name,
        column["rank"],
        column["user_hash"],
        groups_of(column["target"], training_targets),
        column["seconds"].mean(),
        column["tokens"].mean(),
    )


class EvaluationActor:
    """A Stand where Ray Data can call it: samples in, the rank of each target for each contender of their run out."""

    def __init__(self, config: dict[str, Any], contenders: dict[str, list[dict[str, Any]]]) -> None:
        """The contenders by the label of their run; plain, so that a worker can read them whatever it has imported."""
        settings = Config(**config)
        torch.set_num_threads(settings.workers.cpus)
        engine.set_threads(settings.workers.cpus)
        self._contenders = {run: [Contender(**one) for one in own] for run, own in contenders.items()}
        self._stand = Stand(settings, any(one.generates for own in self._contenders.values() for one in own))
        self._warm: set[str] = set()

    def __call__(self, samples: dict[str, Any]) -> dict[str, Any]:
        """`samples` as of `evaluation.samples_of`, and the label of the `run` that each belongs to."""
        parts = [
            self._run(run, {key: column[samples["run"] == run] for key, column in samples.items()})
            for run in np.unique(samples["run"]).tolist()
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _run(self, run: str, samples: dict[str, Any]) -> dict[str, Any]:
        contenders = self._contenders[run]
        histories = [np.asarray(history, np.int32) for history in samples["history"]]
        targets = samples["target"].astype(np.int32)
        if run not in self._warm:  # models are loaded, tries built and caches filled before anything is timed
            self._stand.run(contenders, histories[:1], targets[:1])
            self._warm.add(run)
        outcomes = self._stand.run(contenders, histories, targets)
        count, times = len(histories), len(outcomes)
        return {
            "run": np.repeat(run, count * times),
            "number": np.repeat(np.arange(times), count),
            "recommender": np.repeat([one.name for one in contenders], count),
            "sample_id": np.tile(samples["sample_id"], times),
            "user_hash": np.tile(samples["user_hash"], times),
            "target": np.tile(targets, times),
            "rank": np.concatenate([outcome.ranks_U for outcome in outcomes]),
            "seconds": np.repeat([outcome.seconds / count for outcome in outcomes], count),
            "tokens": np.repeat([outcome.tokens / count for outcome in outcomes], count),
        }
