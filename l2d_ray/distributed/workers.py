"""The actors that hold a model: how many fit, and what they must be told."""

import os
from pathlib import Path

import ray

from l2d_ray.config import Config, ModelConfig
from l2d_ray.workspace import Workspace


def absolute(config: Config, workspace: Workspace) -> Config:
    """The configuration with this process's relative paths made absolute: workers have another working folder."""
    model = config.model.model_dump()
    for key in ("name", "adapter"):
        if model[key] and Path(model[key]).expanduser().exists():
            model[key] = str(Path(model[key]).expanduser().resolve())
    return config.model_copy(update={"workspace": workspace.uri, "model": ModelConfig(**model)})


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
