"""The index of a memory's snapshot, with Ray: a task for each shard, twice, and one for what needs all of them.

Sums and second moments of the shards first; the map of the space (and a FAISS index, if it needs training) from all of
them; then the shards' indexes; last, the index measures itself. Each step leaves its files, and the same command again
goes on from what is there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import ray
from ray.exceptions import RayError
from tqdm import tqdm

from l2d_ray.config import Config
from l2d_ray.distributed.job import root_error
from l2d_ray.distributed.workers import check_room, workers_that_fit
from l2d_ray.index.exchange import Request, drive, partition
from l2d_ray.index.manifest import IndexManifest, IndexQuality, ShardRecord
from l2d_ray.index.tuning import find_setting
from l2d_ray.stages.indexing import Fitted, IndexPlan, build_shard, finish, fit, open_shard, plan_index, sum_moments
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class IndexResult:
    """The index, and what it loses against looking at every row."""

    index: str
    """Path of its manifest in the workspace."""
    snapshot: int
    shards: int
    shards_reused: int
    """Shards that an earlier run had completed."""
    rows: int
    items: int
    """Items with at least one row."""
    space: str
    factory: str
    search: str
    """FAISS search setting that reaches the recall asked for."""
    recall_top_m: float
    recall_top_k: float
    bytes_per_row: float
    seconds: float


def build_index(config: Config) -> IndexResult:
    """Build, or finish building, the index that `config.index` describes.

    Raises InputError if there is no memory, or if the space or the FAISS factory string does not fit it.
    """
    started = time.time()
    plan = plan_index(config)
    manifest, reused = _build(config, plan, started)
    return IndexResult(
        index=Workspace.open(config.workspace).path(plan.manifest),
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
        seconds=round(time.time() - started, 3),
    )


def _build(config: Config, plan: IndexPlan, started: float) -> tuple[IndexManifest, int]:
    workspace = Workspace.open(plan.workspace)
    if workspace.exists(plan.manifest):
        return IndexManifest.read(workspace, plan.manifest), plan.num_shards
    check_room(config)
    reused = sum(workspace.exists(f"{plan.folder}/shard={shard}.json") for shard in range(plan.num_shards))
    shards = range(plan.num_shards)
    _each("moments", config, sum_moments, [(plan, shard) for shard in shards])
    (fitted,) = _each("space and training", config, fit, [(plan,)], gpus=config.workers.gpus)
    builds = [(plan, fitted, shard) for shard in shards]
    records: list[ShardRecord] = _each("shards", config, build_shard, builds, gpus=config.workers.gpus)
    tuned = _tune(config, plan, fitted, records)
    return finish(plan, fitted, records, tuned, started), reused


def _tune(config: Config, plan: IndexPlan, fitted: Fitted, records: list[ShardRecord]) -> tuple[str, IndexQuality]:
    """Find the search setting with actors that share the shards, so that no machine needs room for all of them."""
    parts = partition(len(records), min(len(records), workers_that_fit(config)))
    cpus = config.workers.cpus
    kind = ray.remote(_Shards).options(num_cpus=cpus, scheduling_strategy="SPREAD")
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
        faiss.omp_set_num_threads(threads)
        self._shards = [open_shard(plan, fitted, record) for record in records]

    def answer(self, request: Request) -> list[Any]:
        return request.answer(self._shards)


def _each(
    label: str, config: Config, step: Callable[..., Any], calls: list[tuple[Any, ...]], gpus: float = 0
) -> list[Any]:
    """The results of tasks, in the order of the calls. An error stops the others and is raised when they have ended."""
    cpus = config.workers.cpus
    task = ray.remote(_with_threads).options(num_cpus=cpus, num_gpus=gpus, max_retries=3)
    number = {task.remote(cpus, step, call): n for n, call in enumerate(calls)}
    results: list[Any] = [None] * len(calls)
    first_error: RayError | None = None
    with tqdm(total=len(calls), desc=label, unit="task", disable=None) as bar:
        left = list(number)
        while left:
            (done,), left = ray.wait(left)
            try:
                results[number[done]] = ray.get(done)
            except RayError as error:
                first_error = first_error or error
                for other in left:
                    ray.cancel(other)
            bar.update()
    if first_error:
        raise root_error(first_error) from None
    return results


def _with_threads(threads: int, step: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    faiss.omp_set_num_threads(threads)  # torch's are as many: Ray says so by OMP_NUM_THREADS
    return step(*call)
