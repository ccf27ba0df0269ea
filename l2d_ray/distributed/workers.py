"""The actors that hold a model: how many fit."""

import os

import ray

from l2d_ray.config import Config


def workers_that_fit(config: Config) -> int:
    """How many workers of `workers.cpus` and `workers.gpus` the cluster has room for now; at least `workers.min`."""
    resources = ray.cluster_resources()
    cores = resources.get("CPU", 1)
    if len(ray.nodes()) == 1:  # a small machine may promise Ray more CPUs than it has
        cores = min(cores, os.cpu_count() or 1)
    rooms = [cores / config.workers.cpus]
    if config.workers.gpus:
        rooms.append(resources.get("GPU", 0) / config.workers.gpus)
    return max(config.workers.min, int(min(rooms)))
