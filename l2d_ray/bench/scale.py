"""Benchmark of how jobs/build_memory.py scales with workers and samples: speed, driver memory, requests, bookkeeping.

Every build runs in a separate process, and has `workers.cpus` cores for each worker (`bench.cores`).
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pyarrow as pa

from l2d_ray.bench.cores import on_cores_of_its_workers
from l2d_ray.bench.counting_proxy import Request, counting_proxy
from l2d_ray.config import Config
from l2d_ray.core.capacity import MemorySizes, Rates
from l2d_ray.data.dataset import Dataset, write_manifest, write_part
from l2d_ray.data.files import join
from l2d_ray.data.interactions import user_hashes
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.progress import Progress
from l2d_ray.encoding import identify_memory
from l2d_ray.memory.store import SNAPSHOTS_FOLDER, MemoryStore
from l2d_ray.schema import HISTORIES, Split
from l2d_ray.stages.extraction import plan_units
from l2d_ray.stages.settings import for_memory
from l2d_ray.storage import ObjectStorage
from l2d_ray.timing import timed
from l2d_ray.workspace import Workspace

UNITS = 10
"""Units at scale 1, if `memory.units` does not say."""


@dataclass(frozen=True)
class ScaleRun:
    """One build of a memory."""

    workers: int
    scale: int
    samples: int
    units: int
    seconds: float
    planned_seconds: float
    """Duration by the formula of jobs/plan_capacity.py, with the rates of the whole benchmark."""
    driver_megabytes: float
    """Largest resident memory of the job's own process."""
    plan_seconds: float
    """Time to divide the dataset into units."""
    list_seconds: float
    """Time to list and read the records of all units."""
    snapshot_seconds: float
    """Time to record a snapshot, which reads them once more."""
    data_bytes: int
    """Bytes of the data files."""
    planned_bytes: int
    """Size of the data files by the formula."""
    reads: int | None
    """Requests that only read. None if requests are not counted."""
    writes: int | None
    """Requests that stores charge as writes, without those for the data files."""
    data_requests: int | None
    """Requests that upload data files."""


@dataclass(frozen=True)
class ScaleBenchmark:
    """Rates of all builds, and each build. The first three are settings of jobs/plan_capacity.py."""

    samples_per_second: float
    """Rate of one worker between the smallest and the largest scale, so that the start cancels out."""
    start_seconds: float
    """Seconds of one worker's build that do not depend on the samples."""
    scaling: float
    """Samples per second of each of `bench.workers` workers over those of one alone."""
    speedup: float
    """Samples per second of all of them over those of one alone."""
    driver_growth: float
    """Driver memory at the largest scale over that at the smallest; the largest ratio."""
    reads_per_unit: float | None
    """Requests that each further unit takes."""
    writes_per_unit: float | None
    """The same, without those for the data files."""
    plan_error: float
    """Largest difference between planned and measured seconds, as a share of the latter."""
    runs: list[ScaleRun]


def bench_scale(config: Config) -> ScaleBenchmark:
    """Build memories of growing datasets with one worker and with `bench.workers`, and delete them again.

    The dataset of scale n holds the first users of the workspace's dataset n times. Requests are counted if the
    workspace is on an object store that is reached by http://.
    """
    config = for_memory(config)
    source = Dataset.open(Workspace.open(config.workspace))
    users, items, scales = _first_users(source, config.bench.samples), source.items(), sorted(set(config.bench.scales))
    numbers = sorted({1, config.bench.workers})
    runs: list[ScaleRun] = []
    with Progress(len(scales) * len(numbers), "building memories", "builds") as bar:
        for scale in scales:
            uri = join(config.workspace, f"bench-scale-{scale}")
            workspace = Workspace.open(uri)
            workspace.delete("")
            _write(workspace, users, items, scale)
            for workers in numbers:
                changes = {
                    "workers.min": workers,
                    "workers.max": workers,
                    "memory.units": scale * (config.memory.units or UNITS),
                }
                runs.append(_run(config.replace(changes | {"workspace": uri}), scale))
                workspace.delete("memory")
                bar.advance()
            workspace.delete("")
    return _summary(runs, len(scales))


def _first_users(dataset: Dataset, samples: int) -> pa.Table:
    """Return the first users (`schema.HISTORIES`) that have this many training samples, or all."""
    tables: list[pa.Table] = []
    for users in dataset.iter_users(batch_users=1):
        tables.append(users)
        samples -= sum(splits.count(Split.TRAIN) for splits in users["splits"].to_pylist())
        if samples <= 0:
            break
    return pa.concat_tables(tables)


def _write(workspace: Workspace, users: pa.Table, items: pa.Table, scale: int) -> None:
    """Write a dataset that holds these users `scale` times, under other names."""
    copies = []
    for copy in range(scale):
        ids = pa.array([f"{user} {copy}" for user in users["user_id"].to_pylist()])
        hashes = pa.array(user_hashes(ids))
        copies.append(pa.table([ids, hashes, *users.columns[2:]], schema=HISTORIES))
    histories = pa.concat_tables(copies).sort_by([("user_hash", "ascending"), ("user_id", "ascending")])
    write_manifest(workspace, items, [write_part(workspace, 0, histories.combine_chunks())], {"scale": scale})


def _run(config: Config, scale: int) -> ScaleRun:
    """Build a memory in another process and measure its bookkeeping in this one."""
    workspace = Workspace.open(config.workspace)
    dataset, store = Dataset.open(workspace), MemoryStore(workspace)
    with _counted(config.workspace) as (uri, requests):
        seconds, driver_megabytes = on_cores_of_its_workers(_build, config.replace({"workspace": uri}))
    plan_seconds, units = timed(lambda: plan_units(config, dataset))
    list_seconds, records = timed(store.units)
    workspace.delete(SNAPSHOTS_FOLDER)
    names = [unit.name for unit in units]
    snapshot_seconds, snapshot = timed(lambda: store.take_snapshot(names, dataset.digest, 1.0))
    identity = identify_memory(config)
    sizes = MemorySizes(snapshot.rows, len(units), identity.num_shards, identity.dimension)
    data = [request for request in requests if request.method != "GET" and "/memory/data/" in request.path]
    counted = bool(requests)
    return ScaleRun(
        workers=config.workers.min,
        scale=scale,
        samples=snapshot.rows,
        units=len(units),
        seconds=round(seconds, 3),
        planned_seconds=0.0,
        driver_megabytes=round(driver_megabytes, 1),
        plan_seconds=round(plan_seconds, 4),
        list_seconds=round(list_seconds, 4),
        snapshot_seconds=round(snapshot_seconds, 4),
        data_bytes=sum(file.bytes for record in records.values() for file in record.files),
        planned_bytes=sizes.bytes,
        reads=sum(not request.is_write for request in requests) if counted else None,
        writes=sum(request.is_write for request in requests) - len(data) if counted else None,
        data_requests=len(data) if counted else None,
    )


def _build(config: Config) -> tuple[float, float]:
    """Build a memory; return its seconds and this process's largest resident memory in megabytes."""
    return build_memory(config).seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _summary(runs: list[ScaleRun], scales: int) -> ScaleBenchmark:
    """Fit the formula's rates to the builds, which are sorted by scale and then by workers."""
    per_scale = len(runs) // scales
    alone, together = runs[::per_scale], runs[per_scale - 1 :: per_scale]
    rate, workers = 1 / _slope(alone, "seconds", "samples"), together[0].workers
    speedup = 1 / _slope(together, "seconds", "samples") / rate
    rates = Rates(rate, alone[-1].seconds - alone[-1].samples / rate, speedup / workers)
    planned = [replace(run, planned_seconds=round(rates.seconds(run.samples, run.workers), 3)) for run in runs]
    counted = runs[0].reads is not None
    return ScaleBenchmark(
        samples_per_second=round(rate, 3),
        start_seconds=round(rates.start_seconds, 3),
        scaling=round(rates.scaling, 3),
        speedup=round(speedup, 3),
        driver_growth=round(max(some[-1].driver_megabytes / some[0].driver_megabytes for some in (alone, together)), 3),
        reads_per_unit=round(_slope(alone, "reads", "units"), 2) if counted else None,
        writes_per_unit=round(_slope(alone, "writes", "units"), 2) if counted else None,
        plan_error=round(max(abs(run.planned_seconds / run.seconds - 1) for run in planned), 3),
        runs=planned,
    )


def _slope(runs: list[ScaleRun], what: str, over: str) -> float:
    """Return the growth of one field over another, from the first build to the last."""
    first, last = runs[0], runs[-1]
    return float((getattr(last, what) - getattr(first, what)) / (getattr(last, over) - getattr(first, over)))


@contextmanager
def _counted(uri: str) -> Iterator[tuple[str, list[Request]]]:
    """Yield a URI whose requests go through a proxy, and the list that counts them; `uri` itself if it has no http."""
    storage, parts = Workspace.open(uri).storage, urlsplit(uri)
    endpoint = urlsplit(storage.endpoint or "") if isinstance(storage, ObjectStorage) else urlsplit("")
    if endpoint.scheme != "http":
        yield uri, []
        return
    with counting_proxy(endpoint.hostname or "", endpoint.port or 80) as (port, requests):
        options = dict(parse_qsl(parts.query)) | {"endpoint_override": f"http://127.0.0.1:{port}"}
        yield urlunsplit(parts._replace(query=urlencode(options))), requests
