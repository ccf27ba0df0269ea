"""The endpoint on Ray Serve: gateways that speak HTTP, encoders that hold the model, and the shards of the index.

A request runs: gateway (checks, ids to indices) -> one encoder (the state of the history) -> every shard, in one or two
hops (`index/sharding.py`) -> gateway (merge, titles). Shards are asked in parallel; models and searches run in threads.
Every question carries the version of its release (`releases.py`), so that no answer mixes two.
"""

import math
import uuid
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from l2d_ray.config import Config
from l2d_ray.distributed.serving.encoders import BeamSearcher, Encoder, model_origin
from l2d_ray.distributed.serving.gateway import Gateway, keys_of
from l2d_ray.distributed.serving.hedging import EncoderRouter
from l2d_ray.distributed.serving.shards import MemoryShard
from l2d_ray.serve.releases import Release, ReleaseFile

REPLICA_VARIABLES = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),
}
"""Ray Serve's settings of a replica: one event loop a process, which nothing blocks for long once it has started; and
room for large batches (Ray's own limit is 4 MiB)."""


def build_app(config: Config) -> Application:
    """The application of a configuration, whose `args` in a Serve YAML it is. Raises InputError if nothing is there."""
    return application(start_of(config))


def start_of(config: Config) -> ReleaseFile:
    """What a new endpoint is to serve. Raises InputError if it is not there, or if its index is of another model."""
    release = Release.plan(config)
    model_origin(release)  # which every replica would refuse, later
    return ReleaseFile(release.config.workspace, f"serving/{uuid.uuid4().hex[:12]}.json", release)


def application(file: ReleaseFile) -> Application:
    """The application that serves what `file` names. Raises InputError if the keys cannot be read."""
    config = file.first.config
    keys, settings = keys_of(config.serve), config.serve
    keys.check()
    model = {"num_cpus": config.workers.cpus, "num_gpus": config.workers.gpus}
    manifest = file.first.open().manifest
    megabytes = manifest.rows * manifest.bytes_per_row / 1e6
    parts = min(len(manifest.shards), math.ceil(megabytes / settings.shard_megabytes))
    encoder = _deployment(
        Encoder,
        model,
        num_replicas=settings.encoders,
        max_ongoing_requests=settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=EncoderRouter),
    ).bind(file)
    shards = [
        _deployment(
            MemoryShard,
            {"num_cpus": 0.1},
            name=f"MemoryShard-{number}",
            num_replicas=settings.shard_replicas,
            max_ongoing_requests=64,
        ).bind(file, number, parts)
        for number in range(parts)
    ]
    beams = None
    if settings.beams:
        beams = _deployment(BeamSearcher, model, max_ongoing_requests=1, max_queued_requests=settings.max_waiting).bind(
            file, settings.beams
        )
    return _deployment(
        serve.ingress()(Gateway),
        {"num_cpus": 0.1},
        logs_requests=True,
        num_replicas=settings.gateways,
        max_ongoing_requests=1000,
        max_queued_requests=settings.max_waiting,
    ).bind(file, keys.required(), encoder, shards, beams)


def _deployment(kind: type, resources: dict[str, float], logs_requests: bool = False, **options: Any) -> Any:
    logging_config = {"encoding": "JSON", "enable_access_log": logs_requests}
    # The job's own environment, too: Ray Serve adds only its working_dir to one that is given.
    environment = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    environment["env_vars"] = environment.get("env_vars", {}) | REPLICA_VARIABLES
    return serve.deployment(
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=20,
        logging_config=logging_config,
        ray_actor_options={**resources, "runtime_env": environment},
        **options,
    )(kind)
