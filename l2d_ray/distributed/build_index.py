"""The index stage on Ray: two tasks per shard, and one that combines all shards.

1. Sum the item vectors and moments of every shard.
2. Fit the map of the space to all of them, and train an empty index if it needs training; or take both from the index
   of an older snapshot, with its segments.
3. Build the index of every shard, of what is new.
4. Tune the search, with actors that hold the shards, and measure it, unless the index is exact by construction or its
   base was tuned before.
5. Fit the parameters of the aggregation `posterior` (`distributed/posterior.py`).

Every step leaves files, and the same command continues from them.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from l2d_ray.config import Config
from l2d_ray.core.posterior import Parameters
from l2d_ray.distributed.job import root_error
from l2d_ray.distributed.posterior import ensure_posterior
from l2d_ray.distributed.rounds import in_rounds
from l2d_ray.distributed.tasks import RETRIES, run_tasks
from l2d_ray.distributed.workers import check_room, worker_options, workers_that_fit
from l2d_ray.errors import InputError
from l2d_ray.index.engine import engine
from l2d_ray.index.exchange import Request, drive, partition
from l2d_ray.index.manifest import Fitted, IndexManifest, IndexQuality, ShardRecord
from l2d_ray.index.tuning import EXACT, find_setting
from l2d_ray.stages.index_growth import kept_setting
from l2d_ray.stages.index_plan import IndexPlan, plan_index
from l2d_ray.stages.index_sums import sum_moments
from l2d_ray.stages.indexing import build_shard, finish, fit, open_shard
from l2d_ray.stages.settings import for_evaluation, for_index, record_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexResult:
    """The index, and its recall against a scan of all rows."""

    index: str
    """Location of the manifest."""
    snapshot: int
    shards: int
    shards_reused: int
    """Number of shards that an earlier run completed."""
    rows: int
    items: int
    """Number of items with at least one row."""
    space: str
    factory: str
    search: str
    """Search setting that reaches `index.target_recall`."""
    recall_top_m: float
    recall_top_k: float
    bytes_per_row: float
    segments: int
    """Number of segments of every shard: 1, and more after the memory grew."""
    segments_kept: int
    """Number of those that are from the index of an older snapshot, with its map."""
    seconds: float
    posterior: Parameters | None = None
    """The parameters of the aggregation `posterior`; None if they could not be fitted."""


def build_index(config: Config) -> IndexResult:
    """Build an index, or complete it, and record its settings as those to recommend with.

    Settings of `config.index` that are not given are those of the index that was built last. Raises InputError if there
    is no memory, or if the space or the factory string does not fit it.
    """
    started, indexed = time.time(), for_index(config)
    result = ensure_index(indexed)
    posterior = _fit(config, result.snapshot)
    record_index(indexed, result.snapshot)  # last, because an endpoint may follow the record
    return replace(result, posterior=posterior, seconds=round(time.time() - started, 3))


def _fit(config: Config, snapshot: int) -> Parameters | None:
    """Return the parameters of the aggregation `posterior`; say so in one line if they cannot be fitted."""
    try:
        return ensure_posterior(for_evaluation(config).replace({"index.snapshot": snapshot})).parameters
    except InputError as error:
        logger.warning("%s. No parameters were fitted for aggregation=posterior", error)
        return None


def ensure_index(config: Config) -> IndexResult:
    """Build the index that `config.index` describes, or complete it, and record nothing else.

    Raises InputError as `build_index` does.
    """
    started = time.time()
    plan = plan_index(config)
    manifest, reused = _build(config, plan, started)
    return IndexResult(
        index=plan.workspace.path(plan.manifest),
        snapshot=manifest.snapshot,
        shards=len(manifest.shards),
        shards_reused=reused,
        rows=manifest.rows,
        items=manifest.items,
        space=manifest.space,
        factory=manifest.factory,
        search=manifest.search,
        recall_top_m=manifest.quality.recall_top_m,
        recall_top_k=manifest.quality.recall_top_k,
        bytes_per_row=manifest.bytes_per_row,
        segments=len(manifest.fitted.segments),
        segments_kept=manifest.fitted.kept,
        seconds=round(time.time() - started, 3),
    )


def _build(config: Config, plan: IndexPlan, started: float) -> tuple[IndexManifest, int]:
    """Return the manifest, and the number of shards that were complete before."""
    workspace, shards = plan.workspace, range(plan.num_shards)
    if workspace.exists(plan.manifest):
        return IndexManifest.read(workspace, plan.manifest), plan.num_shards
    check_room(config)
    reused = sum(workspace.exists(plan.shard_record(shard)) for shard in shards)
    run_tasks("moments", config, sum_moments, [(plan, shard) for shard in shards])
    (fitted,) = run_tasks("space and training", config, fit, [(plan,)], gpus=config.workers.gpus)
    builds = [(plan, fitted, shard) for shard in shards]
    records: list[ShardRecord] = run_tasks("shards", config, build_shard, builds, gpus=config.workers.gpus)
    tuned = kept_setting(plan, fitted) or _tune(config, plan, fitted, records)
    return finish(plan, fitted, records, tuned, started), reused


def _tune(config: Config, plan: IndexPlan, fitted: Fitted, records: list[ShardRecord]) -> tuple[str, IndexQuality]:
    """Find the search setting; again from the start if Ray gives up on an actor, whatever its retries."""
    if engine.create(plan.factory, plan.dimension).exhaustive:
        return EXACT
    (tuned,) = in_rounds(
        {"search": plan}, lambda pieces: iter([(["search"], _tune_once(config, plan, fitted, records))])
    )
    return tuned


def _tune_once(config: Config, plan: IndexPlan, fitted: Fitted, records: list[ShardRecord]) -> tuple[str, IndexQuality]:
    """Find the search setting with actors that share the shards, so that no node needs room for all of them."""
    parts = partition(len(records), min(len(records), workers_that_fit(config)))
    cpus = config.workers.cpus
    options = worker_options(config) | {"num_gpus": 0, "max_restarts": RETRIES, "max_task_retries": RETRIES}
    kind = ray.remote(_Shards).options(**options, scheduling_strategy="SPREAD")
    actors = [kind.remote(cpus, plan, fitted, [records[shard] for shard in part]) for part in parts]

    def send(request: Request) -> list[Any]:
        requests = request.split(map(len, parts))
        pending = [actor.answer.remote(share) for actor, share in zip(actors, requests, strict=True)]
        return [answer for answers in ray.get(pending) for answer in answers]

    try:
        return drive(find_setting([record.rows for record in records], plan.config.target_recall), send)
    except RayError as error:
        raise root_error(error) from None


class _Shards:
    """Ray actor: some shards of an index."""

    def __init__(self, threads: int, plan: IndexPlan, fitted: Fitted, records: list[ShardRecord]) -> None:
        engine.set_threads(threads)
        self._shards = [open_shard(plan, fitted, record) for record in records]

    def answer(self, request: Request) -> list[Any]:
        return request.answer(self._shards)
