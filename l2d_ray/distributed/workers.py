"""Sizes of the pools of workers, which hold a model, and where they run.

On a cluster, pools ask for more workers than fit: Ray's autoscaler starts nodes for actors that wait.
"""

import os
import re
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from l2d_ray.config import Config, WorkersConfig
from l2d_ray.distributed.demand import gather
from l2d_ray.distributed.job import connect, joins_a_cluster
from l2d_ray.distributed.screen import say
from l2d_ray.errors import InputError

ASK_AHEAD = 256
"""Workers of a pool that may wait for nodes at the same time. Each costs Ray some milliseconds."""


def worker_options(config: Config) -> dict[str, Any]:
    """Return the options with which Ray places one worker: CPUs, GPUs and labels of the node."""
    workers = config.workers
    return {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "label_selector": workers.labels}


def check_room(config: Config, workers: int = 1, setting: str = "workers.max") -> None:
    """Check that a number of workers fit at once. Ray would wait silently for ever. Connects to Ray.

    On the Ray of this machine alone, raises InputError, which names the `setting` of their number. A cluster may grow:
    there one line on stderr says that the job waits, and this function waits for room for the first worker. Raises
    InputError if the autoscaler cannot start any node for it.
    """
    connect(config)
    room = _room(config.workers)
    if room >= workers:
        return
    lack = _lack(config.workers, workers)
    if not _may_grow():
        raise InputError(f"{lack}; ask for less, or set {setting}")
    say(f"{lack}: waiting for more")
    if not room:
        gather(config.workers, 1)


def workers_that_fit(config: Config) -> int:
    """Return the number of workers that the cluster has room for now, at least `workers.min`.

    Raises InputError if there is no room for `workers.min` (`check_room`).
    """
    check_room(config, config.workers.min)
    fit = _room(config.workers)
    if len(ray.nodes()) == 1:  # a small machine may promise Ray more CPUs than it has
        fit = min(fit, (os.cpu_count() or 1) // config.workers.cpus)
    return max(config.workers.min, fit)


def actor_pool(config: Config, pieces: int) -> ActorPoolStrategy:
    """Return a pool of actors for a number of pieces of work.

    On the Ray of this machine it has as many actors as fit. On a cluster it asks for `workers.max`, or for an actor for
    each piece, and works with those that have found a node.
    """
    workers, fit, growing = config.workers, workers_that_fit(config), _may_grow()
    limit = min(workers.max or (pieces if growing else fit), pieces)
    size = min(max(fit, ASK_AHEAD) if growing else fit, limit)
    return ActorPoolStrategy(
        min_size=size if growing else min(workers.min, limit),  # Ray Data ends actors that wait, down to the minimum
        max_size=limit,
        initial_size=size,  # the pool would start at its minimum and take a minute to grow
        max_tasks_in_flight_per_actor=2,
    )


def training_workers(config: Config, limit: int) -> int:
    """Return the number of workers to train with, at most `limit`. On a cluster, wait until they have room.

    Without `workers.max`, a cluster that has room trains with what fits. An empty one is asked for as many workers as
    there are micro-batches in a batch; more would only make these smaller.

    Raises InputError as `check_room` does.
    """
    workers, training = config.workers, config.finetune
    if not _may_grow():
        number = min(workers.max or workers_that_fit(config), limit)
        check_room(config, number)
        return number
    room, full_batch = _room(workers), -(-training.batch_size // training.micro_batch_size)
    wanted = min(workers.max or (room if room >= workers.min else max(workers.min, full_batch)), limit)
    if room >= wanted:
        return wanted
    say(f"{_lack(workers, wanted)}: waiting up to workers.wait_seconds={workers.wait_seconds:g} for more")
    found = gather(workers, wanted, min(workers.min, wanted), workers.wait_seconds)
    if found < wanted:
        say(f"training starts with {found} of {wanted} workers, which is what the cluster has room for now")
    return found


def _may_grow() -> bool:
    return joins_a_cluster() or len(ray.nodes()) > 1


def _room(workers: WorkersConfig) -> int:
    """Return the number of workers that fit, counted node by node."""
    wanted = workers.resources
    nodes = [node for node in ray.nodes() if node["Alive"] and has_labels(node["Labels"], workers.labels)]
    return sum(int(min(node["Resources"].get(kind, 0) / count for kind, count in wanted.items())) for node in nodes)


def has_labels(labels: dict[str, str], selector: dict[str, str]) -> bool:
    """Return whether the labels of a node match a selector, as Ray decides it."""
    return all(
        (labels.get(key) in re.findall(r"[^,\s]+", value.removeprefix("!").removeprefix("in(").removesuffix(")")))
        != value.startswith("!")
        for key, value in selector.items()
    )


def _lack(asked: WorkersConfig, workers: int) -> str:
    """Return the beginning of a line that says how many workers do not fit, and into what."""
    has, nodes = ray.cluster_resources(), len(ray.nodes())
    labels = f" and workers.labels={asked.labels}" if asked.labels else ""
    return (
        f"{workers} worker{'s' * (workers > 1)} of workers.cpus={asked.cpus} and workers.gpus={asked.gpus:g}{labels} at"
        f" once do not fit into {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs on {nodes}"
        f" node{'s' * (nodes > 1)}"
    )
