"""An endpoint that runs: what its encoders have done, and changing what it serves. Holds no model: starts at once."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import Config
from l2d_ray.errors import InputError
from l2d_ray.serve.releases import Release, ReleaseFile

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its import has made it tell of every handle
APPLICATION = "l2d_ray"
LOAD_SECONDS = 1800
"""A replica may take so long to load a release."""
REPLACED_SECONDS = 300
"""So long a replica that died has a successor."""
ATTEMPTS = 5
"""How often all replicas are told before what they hold is taken for another promotion's."""
UNDER_WAY = "another promotion is under way; run the same command again when it is done"
LOST = (RayError, RayServeException, TimeoutError)
"""What it may mean that a replica died."""


class NoReplicaError(InputError):
    """Replicas of a part died, and none has answered for some seconds."""


def encoder_counts() -> dict[str, int]:
    """What the encoders of the running endpoint have done since they started, in all."""
    counts: Counter[str] = Counter()
    for own in serve.get_deployment_handle("Encoder", APPLICATION).broadcast("counts").results(timeout_s=60):
        counts.update(own)
    return dict(counts)


@dataclass(frozen=True)
class PromoteResult:
    """A release that is served now."""

    version: str
    """As in every answer."""
    previous: str
    """What was served before; its settings promote it again, with its memory named (index.snapshot)."""
    index: str
    """Path of the index in its workspace: index/<snapshot>-<digest>/…"""
    previous_index: str
    load_seconds: float
    """Until every replica held it."""
    seconds: float
    """Until the previous one was forgotten."""


def promote(config: Config) -> PromoteResult:
    """Serve the release of `config` in place of the one that is served, on every replica, without a request failing.

    Every replica loads it beside the old one; then the gateways turn to it; when no request is left that began
    before, the old one is forgotten. Killed at any moment, the same command again completes it. Raises InputError if
    the release is not complete, if its model is not the one that its index's memory was made with, if there is no
    endpoint, if another promotion is under way, if a part has no replica, or if replicas die twice while they load it;
    what is served then stays.
    """
    started = time.monotonic()
    release = Release.plan(config)
    try:
        gateway = serve.get_deployment_handle("Gateway", APPLICATION)
        file: ReleaseFile = gateway.file.remote().result(timeout_s=60)
        names = list(serve.status().applications[APPLICATION].deployments)
    except (RayServeException, KeyError, TimeoutError) as error:
        raise InputError(
            f"no endpoint runs on this Ray ({type(error).__name__}); set RAY_ADDRESS to what jobs/serve.py prints"
        ) from None
    parts = [serve.get_deployment_handle(name, APPLICATION) for name in names]
    old, *others = named = file.read()

    def name(*releases: Release) -> None:
        nonlocal named
        if file.read() != named:
            raise InputError(UNDER_WAY)
        file.write(releases)
        named = list(releases)

    if any(other.version not in (old.version, release.version) for other in others):  # of one that was killed
        _leave(gateway, file, old)
    for last in (False, True):
        name(old, release)
        try:
            _hold(parts * 2, [old.version, release.version], patience=0)  # again for replicas that were starting
            break
        except BaseException as error:
            name(old)  # at once: successors of replicas that have no room for both would die, too
            if last or not isinstance(error, NoReplicaError):
                raise
        _hold(parts, [old.version])
    loaded = time.monotonic()
    if old.version != release.version:
        name(release, old)
        _leave(gateway, file, release)
    name(release)
    _hold(parts, [release.version])
    return PromoteResult(
        version=release.version,
        previous=old.version,
        index=release.index,
        previous_index=old.index,
        load_seconds=round(loaded - started, 3),
        seconds=round(time.monotonic() - started, 3),
    )


def _leave(gateway: DeploymentHandle, file: ReleaseFile, served: Release) -> None:
    """Have every gateway turn to what is served now, and wait until no request is left that began with another."""
    _tell(gateway, "versions", lambda held: held[0] == served.version)
    settings = file.first.config.serve
    time.sleep(1 + max(settings.deadline_seconds, settings.beam_seconds if settings.beams else 0))


def _hold(parts: Sequence[DeploymentHandle], versions: list[str], patience: float | None = None) -> None:
    """Have every replica hold these and nothing else, the first one served."""
    for part in parts:
        _tell(part, "refresh", lambda held: held == list(dict.fromkeys(versions)), patience)


def _tell(
    part: DeploymentHandle, method: str, done: Callable[[list[str]], bool], patience: float | None = None
) -> None:
    """Have every replica of a deployment look what is to be held, until what it then holds is right.

    One that dies meanwhile is replaced within `patience` (`REPLACED_SECONDS`), and its successor reads for itself.
    """
    patience = REPLACED_SECONDS if patience is None else patience
    deadline, attempts = time.monotonic() + patience, 0
    while attempts < ATTEMPTS:
        try:
            held = part.broadcast(method).results(timeout_s=LOAD_SECONDS)
            if not held:
                raise TimeoutError
        except LOST as error:
            if isinstance(error, RayTaskError):  # a replica's answer: it cannot
                raise
            if time.monotonic() > deadline:
                what, then = f"no replica has answered for {patience} s", "run the same command again when one is there"
                if not patience:
                    what, then = "replicas died twice while they loaded this", "is there memory for two releases?"
                raise NoReplicaError(
                    f"{part.deployment_name}: {what} ({type(error).__name__}); `serve status` says why; {then}"
                ) from None
        else:
            if all(map(done, held)):
                return
            attempts += 1
        time.sleep(1)
    raise InputError(UNDER_WAY)
