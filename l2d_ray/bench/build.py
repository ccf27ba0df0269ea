"""Benchmark of the main job against the same extraction in a plain loop: the cost of Ray Data, writing and commits."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import torch

from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.workers import workers_that_fit
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.prefetch import prefetch
from l2d_ray.records import MemoryIdentity
from l2d_ray.stages.extraction import Unit, UnitExtractor, plan_units
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class BuildBenchmark:
    """Medians over alternating runs. Times include the start of the workers and the loading of the model."""

    fraction_of_bare_loop: float
    """Samples per second of the job over those of the loop, median of the pairs."""
    job_samples_per_second: float
    loop_samples_per_second: float
    samples: int
    workers: int


def bench_build(config: Config) -> BuildBenchmark:
    """Run the loop and the job in turn, `bench.repeats` times, and delete the memory after each job."""
    workspace = Workspace.open(config.workspace)
    if workspace.exists("memory"):
        raise InputError(f"{workspace.path('memory')}: would be deleted; give a workspace without a memory")
    units, identity = plan_units(config, Dataset.open(workspace)), identify_memory(config)
    workers = config.workers.max or workers_that_fit(config)
    job_seconds, loop_seconds, samples = [], [], 0
    for _ in range(config.bench.repeats):
        started = time.perf_counter()
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (config, identity)) as pool:
            samples = sum(pool.map(_extract, units))
        loop_seconds.append(time.perf_counter() - started)
        job_seconds.append(build_memory(config).seconds)
        workspace.delete("memory")
    return BuildBenchmark(
        fraction_of_bare_loop=round(median(loop / job for loop, job in zip(loop_seconds, job_seconds, strict=True)), 3),
        job_samples_per_second=round(samples / median(job_seconds), 3),
        loop_samples_per_second=round(samples / median(loop_seconds), 3),
        samples=samples,
        workers=workers,
    )


def extract_only(extractor: UnitExtractor, unit: Unit) -> int:
    """Run a unit's samples, discard the states, and return the number of samples."""
    samples = 0
    for batch in prefetch(extractor.batches(unit)):
        if batch.prompts:
            extractor.encoder.extract(Prompts.join(batch.prompts))
        samples += len(batch.prompts)
    return samples


def _start(config: Config, identity: MemoryIdentity) -> None:
    """Load the model in a process of the loop, as a worker of the job does."""
    global _extractor
    torch.set_num_threads(config.workers.cpus)
    _extractor = UnitExtractor(config, identity)


def _extract(unit: Unit) -> int:
    return extract_only(_extractor, unit)


_extractor: UnitExtractor
