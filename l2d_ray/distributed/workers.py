"""The actors that hold a model, and tasks of their size: how many fit."""

import os

import ray
from ray.data import ActorPoolStrategy

from l2d_ray.config import Config
from l2d_ray.distributed.job import joins_a_cluster
from l2d_ray.distributed.screen import say
from l2d_ray.errors import InputError


def check_room(config: Config, workers: int = 1, setting: str = "workers.max") -> None:
    """Whether so many workers of `workers.cpus` and `workers.gpus` fit at once: Ray would wait for ever, silently.

    Raises InputError, which names the `setting` of their number, where they do not fit on the Ray of this machine
    alone; a cluster may grow, so that one line on stderr says what is waited for.
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
    """How many workers of `workers.cpus` and `workers.gpus` the cluster has room for now; at least `workers.min`, for
    which there must be room (`check_room`)."""
    check_room(config, config.workers.min)
    fit = _room(config)
    if len(ray.nodes()) == 1:  # a small machine may promise Ray more CPUs than it has
        fit = min(fit, (os.cpu_count() or 1) // config.workers.cpus)
    return max(config.workers.min, fit)


def actor_pool(config: Config, pieces: int) -> ActorPoolStrategy:
    """Actors for so many pieces of work: as many as fit now, and on a cluster that may grow as many as it grows to
    hold."""
    workers, fit = config.workers, workers_that_fit(config)
    growing = len(ray.nodes()) > 1 or _room(config) < workers.min
    most = min(workers.max or (pieces if growing else fit), pieces)
    return ActorPoolStrategy(
        min_size=min(workers.min, most),
        max_size=most,
        initial_size=min(fit, most),  # the pool would start at its minimum and take a minute to grow
        max_tasks_in_flight_per_actor=2,
    )


def _room(config: Config) -> int:
    """How many workers the nodes have room for, each for itself."""
    asked = config.workers
    wanted = {"CPU": asked.cpus} | ({"GPU": asked.gpus} if asked.gpus else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get(kind, 0) / count for kind, count in wanted.items())) for node in nodes)
