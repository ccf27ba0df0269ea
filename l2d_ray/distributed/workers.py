"""Sizes of the pools of actors that hold a model."""

import os

import ray
from ray.data import ActorPoolStrategy

from l2d_ray.config import Config
from l2d_ray.distributed.job import joins_a_cluster
from l2d_ray.distributed.screen import say
from l2d_ray.errors import InputError


def check_room(config: Config, workers: int = 1, setting: str = "workers.max") -> None:
    """Check that a number of workers fit at once. Ray would wait silently for ever.

    On the Ray of this machine alone, raises InputError, which names the `setting` of their number. A cluster may grow,
    so there one line on stderr says that the job waits.
    """
    if _room(config) >= workers:
        return
    asked, has, nodes = config.workers, ray.cluster_resources(), len(ray.nodes())
    lack = (
        f"{workers} worker{'s' * (workers > 1)} of workers.cpus={asked.cpus} and workers.gpus={asked.gpus:g} at once do"
        f" not fit into {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs on {nodes} node{'s' * (nodes > 1)}"
    )
    if not joins_a_cluster():
        raise InputError(f"{lack}; ask for less, or set {setting}")
    say(f"{lack}: waiting for more")


def workers_that_fit(config: Config) -> int:
    """Return the number of workers that the cluster has room for now, at least `workers.min`.

    Raises InputError if there is no room for `workers.min` (`check_room`).
    """
    check_room(config, config.workers.min)
    fit = _room(config)
    if len(ray.nodes()) == 1:  # a small machine may promise Ray more CPUs than it has
        fit = min(fit, (os.cpu_count() or 1) // config.workers.cpus)
    return max(config.workers.min, fit)


def actor_pool(config: Config, pieces: int) -> ActorPoolStrategy:
    """Return a pool of actors for a number of pieces of work.

    It starts with as many actors as fit now, and grows with the cluster if that may grow.
    """
    workers, fit = config.workers, workers_that_fit(config)
    growing = len(ray.nodes()) > 1 or _room(config) < workers.min
    limit = min(workers.max or (pieces if growing else fit), pieces)
    return ActorPoolStrategy(
        min_size=min(workers.min, limit),
        max_size=limit,
        initial_size=min(fit, limit),  # the pool would start at its minimum and take a minute to grow
        max_tasks_in_flight_per_actor=2,
    )


def _room(config: Config) -> int:
    """Return the number of workers that fit, counted node by node."""
    asked = config.workers
    wanted = {"CPU": asked.cpus} | ({"GPU": asked.gpus} if asked.gpus else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get(kind, 0) / count for kind, count in wanted.items())) for node in nodes)
