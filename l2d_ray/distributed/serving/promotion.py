"""Operation of a running endpoint: totals of its encoders, and promotion of another release. Holds no model."""

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

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # by default it logs every handle
APPLICATION = "l2d_ray"
"""Name of the endpoint's application on Ray Serve."""
CALL_SECONDS = 60
"""Seconds that a replica may take to answer a short call."""
LOAD_SECONDS = 1800
"""Seconds that a replica may take to load a release."""
REPLACED_SECONDS = 300
"""Seconds within which a replica that died must be replaced."""
ATTEMPTS = 5
"""Calls to all replicas after which other versions than the named ones mean another promotion."""
UNDER_WAY = "another promotion is under way; run the same command again when it is done"
LOST = (RayError, RayServeException, TimeoutError)
"""Errors of a call that may mean that a replica died."""


class OtherPromotionError(InputError):
    """Another promotion has changed what is served."""


class NoReplicaError(InputError):
    """Replicas of a component died, and no other one answered in time."""


@dataclass(frozen=True)
class PromoteResult:
    """A release that is served now."""

    version: str
    """Version of the release, as in every response."""
    previous: str
    """Version that was served before. Its settings promote it again, with its memory named (index.snapshot)."""
    index: str
    """Path of the index in its workspace: index/<snapshot>-<digest>/…"""
    previous_index: str
    """Path of the index that was served before."""
    load_seconds: float
    """Seconds until every replica had loaded the release."""
    seconds: float
    """Seconds until every replica had dropped the previous one."""


def encoder_counts() -> dict[str, int]:
    """Return the totals of all models of the running endpoint since they started (`EncoderMetrics.counts`)."""
    totals: Counter[str] = Counter()
    distributed = "Encoder" in serve.status().applications[APPLICATION].deployments
    models = serve.get_deployment_handle("Encoder" if distributed else "Gateway", APPLICATION)
    for counts in models.broadcast("counts").results(timeout_s=CALL_SECONDS):
        totals.update(counts)
    return dict(totals)


def promote(config: Config) -> PromoteResult:
    """Serve the release of `config` in place of the served one, on every replica, without a failed request.

    Every replica loads the new release while it holds the old one. Then the gateways turn to the new one. When no
    request that began with the old one is left, the replicas drop it. If the process is killed, the same command
    completes the promotion.

    The endpoint keeps the recommenders next to L2D that it was started with. It loads their weights anew, too.

    Raises InputError if the release is not complete, if the memory of its index was made with another model, if no
    endpoint runs, if another promotion is under way, if a component has no replica, or if replicas die twice while they
    load the release. The old release then stays served.
    """
    endpoint = _Endpoint()
    return _promote(endpoint, Release.plan(config, endpoint.named[0].recommenders))


def promote_release(release: Release) -> PromoteResult:
    """Serve a release in place of the served one. Raises InputError as `promote` does."""
    return _promote(_Endpoint(), release)


def _promote(endpoint: "_Endpoint", release: Release) -> PromoteResult:
    started = time.monotonic()
    old, *others = endpoint.named
    if any(other.version not in (old.version, release.version) for other in others):  # left by a killed promotion
        endpoint.drain(old)
    endpoint.load(old, release)
    loaded = time.monotonic()
    if old.version != release.version:
        endpoint.name(release, old)
        endpoint.drain(release)
    endpoint.name(release)
    endpoint.hold(release)
    return PromoteResult(
        version=release.version,
        previous=old.version,
        index=release.index,
        previous_index=old.index,
        load_seconds=round(loaded - started, 3),
        seconds=round(time.monotonic() - started, 3),
    )


class _Endpoint:
    """The endpoint that runs on this Ray: its release file, and the deployments whose replicas follow it."""

    def __init__(self) -> None:
        """Find the endpoint. Raises InputError if none runs."""
        try:
            self._gateway = serve.get_deployment_handle("Gateway", APPLICATION)
            self._file: ReleaseFile = self._gateway.file.remote().result(timeout_s=CALL_SECONDS)
            names = list(serve.status().applications[APPLICATION].deployments)
        except (RayServeException, KeyError, TimeoutError) as error:
            raise InputError(
                f"no endpoint runs on this Ray ({type(error).__name__}); set RAY_ADDRESS to what jobs/serve.py prints"
            ) from None
        self._deployments = [serve.get_deployment_handle(name, APPLICATION) for name in names]
        self.named = self._file.read()
        """The releases that the file names, the served one first."""

    def name(self, *releases: Release) -> None:
        """Write the release file. Raises OtherPromotionError if another promotion has changed it."""
        if self._file.read() != self.named:
            raise OtherPromotionError(UNDER_WAY)
        self._file.write(releases)
        self.named = list(releases)

    def load(self, old: Release, new: Release) -> None:
        """Have every replica load `new` while `old` stays served. Tries a second time if replicas die.

        After a failure, names `old` alone again and raises the error.
        """
        for last in (False, True):
            self.name(old, new)
            try:
                for _ in range(2):  # twice, for replicas that were starting
                    self._broadcast_all([old, new], patience=0)
                return
            except BaseException as error:
                self.name(old)  # at once: where two releases do not fit, the successors of dead replicas would die too
                if last or not isinstance(error, NoReplicaError):
                    raise
            self.hold(old)

    def hold(self, release: Release) -> None:
        """Have every replica hold this release and no other."""
        self._broadcast_all([release], patience=REPLACED_SECONDS)

    def drain(self, served: Release) -> None:
        """Have every gateway turn to the served release, and wait for requests that began with another to end."""
        _broadcast(self._gateway, "versions", lambda versions: versions[0] == served.version, REPLACED_SECONDS)
        settings = self._file.first.config.serve
        time.sleep(1 + max(settings.deadline_seconds, settings.beam_seconds if settings.beams else 0))

    def _broadcast_all(self, releases: Sequence[Release], patience: float) -> None:
        """Have every replica hold exactly these releases, the first one served."""
        expected = list(dict.fromkeys(release.version for release in releases))
        for deployment in self._deployments:
            _broadcast(deployment, "refresh", lambda versions: versions == expected, patience)


def _broadcast(deployment: DeploymentHandle, method: str, done: Callable[[list[str]], bool], patience: float) -> None:
    """Call a method of every replica of a deployment until the versions that each returns are right.

    Raises NoReplicaError if no replica answers for `patience` seconds, within which Ray Serve replaces one that died;
    its successor reads the release file itself. Raises OtherPromotionError if the versions stay wrong.
    """
    deadline, attempts = time.monotonic() + patience, 0
    while attempts < ATTEMPTS:
        try:
            replies = deployment.broadcast(method).results(timeout_s=LOAD_SECONDS)
            if not replies:
                raise TimeoutError
        except LOST as error:
            if isinstance(error, RayTaskError):  # raised by a replica, which therefore lives
                raise
            if time.monotonic() > deadline:
                raise NoReplicaError(_loss(deployment, error, patience)) from None
        else:
            if all(map(done, replies)):
                return
            attempts += 1
        time.sleep(1)
    raise OtherPromotionError(UNDER_WAY)


def _loss(deployment: DeploymentHandle, error: Exception, patience: float) -> str:
    """Return the message for replicas that died."""
    what, remedy = f"no replica has answered for {patience} s", "run the same command again when one answers"
    if not patience:
        what, remedy = "replicas died twice while they loaded the release", "two releases may need more memory"
    return f"{deployment.deployment_name}: {what} ({type(error).__name__}); `serve status` shows the cause; {remedy}"
