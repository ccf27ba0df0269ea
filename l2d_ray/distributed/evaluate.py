"""The evaluation, with Ray Data: validation chooses, test reports.

Two passes over samples, each on a pool of actors that hold the models and the indexes: validation samples run through
L2D at every M and prior of the configuration, whose best go into the test pass. Recommenders that write text see a part
of the test samples only, and all the others are run on that part once more, beside them, for a fair comparison.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from tqdm import tqdm

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.workers import absolute, workers_that_fit
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.evaluation import (
    Contender,
    Stand,
    as_plain,
    contender,
    groups_of,
    samples_of,
    spaces_of,
    summarise,
    training_pairs,
)
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.indexing import plan_index
from l2d_ray.recommender import check_identity
from l2d_ray.reports import plot, table
from l2d_ray.schema import Split
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class EvaluateResult:
    """Where the report is, and its table."""

    report: str
    """Location of the JSON report; the plots (.png) and the rank of every target (.parquet) lie beside it."""
    results: list[dict[str, Any]]
    """One row a recommender, over all test samples that it ran on."""
    top_m: int
    """M that validation chose for index.space."""
    seconds: float


def evaluate(config: Config) -> EvaluateResult:
    """Evaluate `evaluate.recommenders`, building the indexes that are missing; leave `reports/<evaluate.name>.*`.

    Raises InputError if there is no dataset, memory or model, or if they do not belong together.
    """
    started = time.monotonic()
    workspace = Workspace.open(config.workspace)
    config = absolute(config, workspace)
    dataset = Dataset.open(workspace)
    names = list(dict.fromkeys(config.evaluate.recommenders))
    spaces = spaces_of(names, config)
    unchosen = dict.fromkeys(spaces, config.recommend.top_m)
    for name in names:  # an unknown name is refused before anything is built
        contender(name, config, dict.fromkeys(spaces, ""), unchosen, 0)
    indexes = {space: _index(config, space) for space in spaces}
    pairs = training_pairs(dataset)
    test = samples_of(dataset, Split.TEST, config.evaluate.samples)
    if not test:
        raise InputError(f"{workspace.path('dataset')}: has no test samples; prepare data with another data.split")

    valid = samples_of(dataset, Split.VALID, config.evaluate.samples)
    choice, curves = _choose(config, names, indexes, valid)
    contenders = [contender(name, config, indexes, choice.top_m, choice.prior) for name in names]
    shares = _shares(config, contenders)
    silent = [one for one in contenders if not one.generates]
    table_of = _Table(config, pairs[1])
    rows = table_of.run("test", [*silent, *(one for _, one in shares)], test)
    results = rows[: len(silent)]
    beside = test[: config.evaluate.generation_samples]
    same_users: list[dict[str, Any]] = []
    if any(one.generates for one in contenders):
        same_users = table_of.run("test, beside those that write", contenders, beside)
        written = {row["recommender"]: row for row in same_users}
        results = [
            written[name] if one.generates else results[silent.index(one)]
            for name, one in zip(names, contenders, strict=True)
        ]

    report = {
        "results": results,
        "same_users": same_users,
        "validation": {
            "samples": len(valid),
            "top_m": curves,
            "chosen_top_m": choice.top_m,
            "chosen_prior": choice.prior,
        },
        "fractions": [
            {"recommender": kind, "at": share, "recall@20": row["recall@20"]}
            for (share, kind), row in zip(
                [(share, one.kind) for share, one in shares], rows[len(silent) :], strict=True
            )
        ],
        "indexes": indexes,
        "config": config.model_dump(mode="json"),
    }
    path = f"reports/{config.evaluate.name}"
    workspace.write_json(f"{path}.json", report)
    with workspace.create(f"{path}.png") as stream:
        stream.write(plot(report))
    with workspace.create(f"{path}.parquet") as stream:
        pq.write_table(table_of.ranks(), stream, compression="zstd")
    for title, lines in (("test", results), ("test, all on the same samples", same_users)):
        if lines:
            print(f"\n{title}\n{table(lines)}", flush=True)
    return EvaluateResult(
        report=workspace.path(f"{path}.json"),
        results=[{key: row[key] for key in row if key not in ("intervals", "groups")} for row in results],
        top_m=choice.top_m[config.index.space],
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass(frozen=True)
class _Choice:
    """What validation data chose."""

    top_m: dict[str, int]
    """By space."""
    prior: float


def _choose(
    config: Config, names: Sequence[str], indexes: dict[str, str], valid: list[dict[str, Any]]
) -> tuple[_Choice, list[dict[str, Any]]]:
    """The M and the prior with the best validation Recall@20 (of equals the smaller), and Recall at every M."""
    default = _Choice(dict.fromkeys(indexes, config.recommend.top_m), config.evaluate.priors[0])
    if not valid or not any(name.startswith("l2d") for name in names):
        return default, []
    tried = [
        Contender(f"l2d-local-{space}", "l2d-local", index, top_m=top_m)
        for space, index in indexes.items()
        for top_m in sorted(set(config.evaluate.top_m))
    ]
    priors = [
        Contender("l2d-global", "l2d-global", indexes[config.index.space], prior=prior)
        for prior in sorted(set(config.evaluate.priors))
    ]
    rows = _Table(config, np.empty(0, np.int32)).run("validation", [*tried, *priors], valid)
    curves = [
        {"recommender": one.name, "at": one.top_m, "recall@20": row["recall@20"]}
        for one, row in zip(tried, rows, strict=False)
    ]
    best = {
        space: max((row for row in curves if row["recommender"] == f"l2d-local-{space}"), key=lambda r: r["recall@20"])
        for space in indexes
    }
    prior = max(zip(priors, rows[len(tried) :], strict=True), key=lambda pair: pair[1]["recall@20"])[0].prior
    return _Choice({space: row["at"] for space, row in best.items()}, prior), curves


def _shares(config: Config, contenders: Sequence[Contender]) -> list[tuple[float, Contender]]:
    """L2D of the configured space over every share of the memory; the indexes are built."""
    space = config.index.space
    mapped = {one.kind: one for one in contenders if one.name in ("l2d-global", "l2d-local")}
    shares = []
    for fraction in sorted(set(config.evaluate.fractions)) if mapped else []:
        index = _index(config, space, fraction * config.index.sample_fraction)
        shares += [(fraction, replace(one, name=f"{one.name} of {fraction:g}", index=index)) for one in mapped.values()]
    return shares


def _index(config: Config, space: str, fraction: float | None = None) -> str:
    """The path of the manifest of an index, built if it is missing; refused if it is of another model."""
    changes = {"space": space} if fraction is None else {"space": space, "sample_fraction": fraction}
    config = config.model_copy(update={"index": config.index.model_copy(update=changes)})
    build_index(config)
    path = plan_index(config).manifest
    check_identity(IndexManifest.read(Workspace.open(config.workspace), path).identity, identify_memory(config))
    return path


class _Table:
    """Runs contenders over samples on a pool of actors, and keeps every rank."""

    def __init__(self, config: Config, training_targets: Any) -> None:
        self._config, self._training_targets = config, training_targets
        self._ranks: list[pa.Table] = []

    def run(self, label: str, contenders: Sequence[Contender], samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each contender (`evaluation.summarise`)."""
        config = self._config
        size = config.evaluate.batch_size
        workers = min(config.workers.max or workers_that_fit(config), -(-len(samples) // size))
        outcomes = ray.data.from_items(samples, override_num_blocks=-(-len(samples) // size)).map_batches(
            EvaluationActor,
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=config.workers.cpus,
            num_gpus=config.workers.gpus,
            fn_constructor_args=(config.model_dump(mode="json"), as_plain(contenders)),
        )
        blocks = []
        with tqdm(total=len(samples) * len(contenders), desc=label, unit="rank", disable=None) as bar:
            for block in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
                blocks.append(block)
                bar.update(len(block))
        ranks = pa.concat_tables(blocks)
        self._ranks.append(ranks.append_column("run", pa.array([label] * len(ranks))))
        return [self._row(one.name, number, ranks) for number, one in enumerate(contenders)]

    def ranks(self) -> pa.Table:
        """Every rank of every run: `run`, `recommender`, `sample_id`, `user_hash`, `target`, `rank` (from 0)."""
        return pa.concat_tables(self._ranks).drop_columns(["number", "seconds", "tokens"])

    def _row(self, name: str, number: int, ranks: pa.Table) -> dict[str, Any]:
        own = ranks.filter(pa.compute.equal(ranks["number"], number))
        column = {name: own[name].to_numpy() for name in own.column_names if name != "recommender"}
        groups = groups_of(column["target"], self._training_targets)
        return summarise(
            name, column["rank"], column["user_hash"], groups, column["seconds"].mean(), column["tokens"].mean()
        )


class EvaluationActor:
    """A Stand where Ray Data can call it: samples in, the rank of each target for each contender out."""

    def __init__(self, config: dict[str, Any], contenders: list[dict[str, Any]]) -> None:
        """The arguments are plain so that a worker can read them whatever it has imported."""
        settings = Config(**config)
        torch.set_num_threads(settings.workers.cpus)
        faiss.omp_set_num_threads(settings.workers.cpus)
        self._stand = Stand(settings)
        self._contenders = [Contender(**one) for one in contenders]
        self._warm = False

    def __call__(self, samples: dict[str, Any]) -> dict[str, Any]:
        """`samples` as of `evaluation.samples_of`."""
        histories = [np.asarray(history, np.int32) for history in samples["history"]]
        targets = samples["target"].astype(np.int32)
        if not self._warm:  # models are loaded, tries built and caches filled before anything is timed
            self._stand.run(self._contenders, histories[:1], targets[:1])
            self._warm = True
        outcomes = self._stand.run(self._contenders, histories, targets)
        count, times = len(histories), len(outcomes)
        return {
            "number": np.repeat(np.arange(times), count),
            "recommender": np.repeat([one.name for one in self._contenders], count),
            "sample_id": np.tile(samples["sample_id"], times),
            "user_hash": np.tile(samples["user_hash"], times),
            "target": np.tile(targets, times),
            "rank": np.concatenate([outcome.ranks_U for outcome in outcomes]),
            "seconds": np.repeat([outcome.seconds / count for outcome in outcomes], count),
            "tokens": np.repeat([outcome.tokens / count for outcome in outcomes], count),
        }
