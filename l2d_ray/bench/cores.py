"""Run a stage on some of the cores of this machine, to compare one worker with several.

A worker alone on several cores would look faster than one of many: a thread prepares its next batch, and the job runs
elsewhere.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from l2d_ray.config import Config
from l2d_ray.distributed.job import connect

T = TypeVar("T")


def on_cores_of_its_workers(stage: Callable[[Config], T], config: Config) -> T:
    """Return `stage(config)`, run in a separate process that starts Ray, as a job does.

    The process, Ray and the workers together have `workers.cpus` cores for each of `workers.min` workers. Only Linux
    can do that; elsewhere they have all cores. On a Ray cluster that was there before, it is the job alone.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, stage, config).result()


def _run(stage: Callable[[Config], T], config: Config) -> T:
    import ray

    if hasattr(os, "sched_setaffinity"):
        number = config.workers.min * config.workers.cpus
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])
    connect(config)
    try:
        return stage(config)
    finally:
        ray.shutdown()
