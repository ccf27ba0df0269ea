"""The application on Ray Serve: gateways that speak HTTP, encoders that hold the model, and shards of the index.

Each is a deployment in the distributed layout, which the next paragraphs describe. In the co-located one, a replica of
the gateway holds all three (`colocated.py`). Other recommenders and beam search are deployments in both.

A gateway checks a request and turns item ids into indices. One encoder computes the hidden state of the history. Every
shard group answers, in one or more rounds (`index/exchange.py`). The gateway merges the answers and adds titles.

Shard groups are called in parallel; models and searches run in threads. Every call carries the version of its release
(`serve/releases.py`), so that no answer mixes two.
"""

import math
import uuid
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from l2d_ray.config import Config
from l2d_ray.distributed.serving.colocated import ColocatedGateway
from l2d_ray.distributed.serving.encoders import BeamSearcher, Encoder, model_origin
from l2d_ray.distributed.serving.follower import Follower
from l2d_ray.distributed.serving.gateway import Gateway, keys_of
from l2d_ray.distributed.serving.hedging import EncoderRouter
from l2d_ray.distributed.serving.ray_variables import MAX_MESSAGE_BYTES, Variable
from l2d_ray.distributed.serving.recommenders import Recommenders
from l2d_ray.distributed.serving.shards import MemoryShard
from l2d_ray.distributed.workers import worker_options
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.serve.recommenders import runs_model
from l2d_ray.serve.releases import Release, ReleaseFile

REPLICA_VARIABLES = {
    Variable.USER_CODE_IN_THREAD: "0",
    Variable.ROUTER_IN_LOOP: "0",
    Variable.GRPC_MESSAGE_LENGTH: str(MAX_MESSAGE_BYTES),
}
"""Environment of a replica. One event loop per process is enough: nothing blocks it for long after the start. A
follower calls replicas from a thread, which takes a second one."""


def build_app(config: Config) -> Application:
    """Return the application of a configuration, which a Serve YAML gives as `args`.

    Raises InputError if the release is not complete, or if the keys cannot be read.
    """
    return application(new_release_file(config), config)


def new_release_file(config: Config) -> ReleaseFile:
    """Return the release file of a new endpoint.

    Raises InputError if the release is not complete, if the memory of its index was made with another model, or if
    `serve.follow` contradicts `index.snapshot`.
    """
    if config.serve.follow and config.index.snapshot is not None:
        raise InputError(
            f"index.snapshot={config.index.snapshot}: is one snapshot, but serve.follow=true serves the newest;"
            " leave one of them out"
        )
    release = Release.plan(config)
    model_origin(release)  # here, because every replica would refuse another model, but later
    return ReleaseFile(release.config.workspace, f"serving/{uuid.uuid4().hex[:12]}.json", release)


def application(file: ReleaseFile, given: Config) -> Application:
    """Return the application that serves the releases of `file`, which has the settings that were given for it.

    Raises InputError if the keys cannot be read.
    """
    config = file.first.config
    keys, settings = keys_of(config.serve), config.serve
    keys.check()
    model = worker_options(config)
    beams = None
    if settings.beams:
        beams = _deployment(BeamSearcher, model, max_ongoing_requests=1, max_queued_requests=settings.max_waiting).bind(
            file, settings.beams
        )
    follower = None
    if settings.follow:
        follower = _deployment(Follower, {"num_cpus": 0.1}, variables={}).bind(file, given)
    colocated = is_colocated(config, file.first.open().manifest)
    gateway = _deployment(
        serve.ingress()(ColocatedGateway if colocated else Gateway),
        model if colocated else {"num_cpus": 0.1},
        logs_requests=True,
        name="Gateway",
        num_replicas=settings.encoders if colocated else settings.gateways,
        max_ongoing_requests=1000,
        max_queued_requests=settings.max_waiting,
    )
    others = beams, _recommenders(file), follower
    if colocated:
        return gateway.bind(file, keys.required(), *others)
    encoder = _deployment(
        Encoder,
        model,
        num_replicas=settings.encoders,
        max_ongoing_requests=settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=EncoderRouter),
    ).bind(file)
    return gateway.bind(file, keys.required(), encoder, _shard_groups(file), *others)


def is_colocated(config: Config, manifest: IndexManifest) -> bool:
    """Return whether one process holds all that an answer of L2D needs (`serve.layout`).

    By default only where no promise of the endpoint depends on the distributed layout:

    - An index of one shard process is searched in a few milliseconds, so it does not delay HTTP and model.
    - Several encoders answer for each other, and a returning user always reaches the one that has cached the history.
    - One gateway can keep one model busy. A GPU answers more requests than the Python of one process can handle.
    """
    settings = config.serve
    if settings.layout != "auto":
        return settings.layout == "colocated"
    alone = settings.gateways == settings.encoders == settings.shard_replicas == 1
    return alone and not config.workers.gpus and _megabytes(manifest) <= settings.shard_megabytes


def _megabytes(manifest: IndexManifest) -> float:
    return manifest.rows * manifest.bytes_per_row / 1e6


def _recommenders(file: ReleaseFile) -> Application | None:
    """Return the deployment of the recommenders next to L2D. It has room for a model only if one runs it."""
    config, names = file.first.config, file.first.recommenders
    if not names:
        return None
    return _deployment(
        Recommenders,
        worker_options(config) if runs_model(names, config) else {"num_cpus": 0.1},
        num_replicas=config.serve.encoders,
        max_ongoing_requests=config.serve.max_waiting,
        max_queued_requests=config.serve.max_waiting,
    ).bind(file)


def _shard_groups(file: ReleaseFile) -> list[Application]:
    """Return the deployments of the shards. Each holds about `serve.shard_megabytes`."""
    settings, manifest = file.first.config.serve, file.first.open().manifest
    groups = min(len(manifest.shards), math.ceil(_megabytes(manifest) / settings.shard_megabytes))
    return [
        _deployment(
            MemoryShard,
            {"num_cpus": 0.1},
            name=f"MemoryShard-{number}",
            num_replicas=settings.shard_replicas,
            max_ongoing_requests=64,
        ).bind(file, number, groups)
        for number in range(groups)
    ]


def _deployment(
    kind: type,
    resources: dict[str, Any],
    logs_requests: bool = False,
    variables: dict[str, str] = REPLICA_VARIABLES,
    **options: Any,
) -> Any:
    """Return a deployment of a replica class. `variables` are those of its environment."""
    # Ray Serve would add only the working_dir of the job's environment to this one, so it is added here.
    environment = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    environment["env_vars"] = environment.get("env_vars", {}) | variables
    return serve.deployment(
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=20,
        logging_config={"encoding": "JSON", "enable_access_log": logs_requests},
        ray_actor_options={**resources, "runtime_env": environment},
        **options,
    )(kind)
