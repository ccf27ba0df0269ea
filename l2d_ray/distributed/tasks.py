"""Steps of a stage as Ray tasks."""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from l2d_ray.config import Config
from l2d_ray.distributed.job import connect, root_error
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.workers import worker_options
from l2d_ray.index.engine import engine

RETRIES = 3
"""Number of times that a task starts again, or an actor, after its worker was lost."""


def run_tasks(
    label: str, config: Config, step: Callable[..., Any], calls: list[tuple[Any, ...]], gpus: float = 0
) -> list[Any]:
    """Return the results of `step(*call)` in the order of the calls, each from a task.

    Connects to Ray if there are calls. After an error the other tasks are cancelled, and the error is raised when they
    have ended.
    """
    if not calls:
        return []
    connect(config)
    cpus = config.workers.cpus
    options = worker_options(config) | {"num_gpus": gpus, "max_retries": RETRIES}
    task = ray.remote(_with_threads).options(**options)
    number = {task.remote(cpus, step, call): n for n, call in enumerate(calls)}
    results: list[Any] = [None] * len(calls)
    first_error: RayError | None = None
    with Progress(len(calls), label, "tasks") as bar:
        pending = list(number)
        while pending:
            (done,), pending = ray.wait(pending)
            try:
                results[number[done]] = ray.get(done)
            except RayError as error:
                first_error = first_error or error
                for other in pending:
                    ray.cancel(other)
            bar.advance()
    if first_error:
        raise root_error(first_error) from None
    return results


def _with_threads(threads: int, step: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    engine.set_threads(threads)  # torch has as many: Ray sets OMP_NUM_THREADS
    return step(*call)
