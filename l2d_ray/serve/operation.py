"""Starting an endpoint, and changing what it serves while it serves."""

import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from l2d_ray.config import Config
from l2d_ray.errors import InputError, input_error_in
from l2d_ray.serve.api import KEYS_VARIABLE
from l2d_ray.serve.deployments import application, start_of
from l2d_ray.serve.gateway import keys_of
from l2d_ray.serve.releases import Release, ReleaseFile

APPLICATION = "l2d_ray"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOAD_SECONDS = 1800
"""A replica may take so long to load a release."""
ATTEMPTS = 5
"""How often all replicas are told, where one dies meanwhile."""


@dataclass(frozen=True)
class ServeResult:
    """An endpoint that has been stopped."""

    url: str
    seconds: float
    """It served."""


def serve_until_stopped(config: Config) -> ServeResult:
    """`endpoint` until SIGINT or SIGTERM."""
    stop = threading.Event()
    with endpoint(config) as url:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        started = time.monotonic()
        this_ray = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        if "RAY_AUTH_MODE" in os.environ:  # a Ray of this machine alone asks for the token of the user's home
            this_ray["RAY_AUTH_MODE"] = os.environ["RAY_AUTH_MODE"]
        print(
            f"serving at {url} (page), {url}/docs (interface); Ctrl-C stops; to serve another release instead:",
            *(f"{name}={value}" for name, value in this_ray.items()),
            "python jobs/promote.py …",
            file=sys.stderr,
        )
        stop.wait()
    return ServeResult(url, round(time.monotonic() - started, 3))


@contextmanager
def endpoint(config: Config) -> Iterator[str]:
    """The URL of an endpoint on `serve.host` and `serve.port`, that stops with the block. Needs a Ray.

    Raises InputError if there is nothing to serve, if a replica cannot load it, or if it would be open to other
    machines without a key.
    """
    settings = config.serve
    if settings.host not in LOOPBACK and not keys_of(settings).required():
        raise InputError(
            f"serve.host={settings.host!r}: would answer anybody; set serve.keys_file or {KEYS_VARIABLE}, or listen on"
            " 127.0.0.1"
        )
    file = start_of(config)
    app = application(file)
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        _check_port(settings.host, settings.port)
    elif (running.http_config.host, running.http_config.port) != (settings.host, settings.port):
        raise InputError(
            f"Ray Serve runs on this Ray already, at {running.http_config.host}:{running.http_config.port}, which it"
            " keeps: set serve.host and serve.port to that, or end it with `serve shutdown`"
        )
    http_options = {"host": settings.host, "port": settings.port}
    serve.start(http_options=http_options, logging_config=LoggingConfig(encoding="JSON"))
    ready = threading.Event()
    threading.Thread(target=_say_what_is_missing, args=[ready], daemon=True).start()
    try:
        serve.run(app, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise input_error_in(_complaints()) or error from None
    finally:
        ready.set()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        yield f"http://{host}:{settings.port}"
    finally:
        serve.delete(APPLICATION)  # not the whole of Serve, which others may use
        file.delete()


def _say_what_is_missing(ready: threading.Event) -> None:
    """Ray Serve waits for as long as it takes; whoever started it should know what for."""
    said = ""
    while not ready.wait(10):
        missing = _complaints()
        if missing != said:
            print(f"not ready: {input_error_in(missing) or missing}", file=sys.stderr)
            said = missing


def _complaints() -> str:
    """What the deployments say that are not ready."""
    found = serve.status().applications.get(APPLICATION)
    return "; ".join(part.message for part in found.deployments.values() if part.message) if found else ""


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
    """What was served before; its settings promote it again."""
    index: str
    """Path of the index in its workspace."""
    load_seconds: float
    """Until every replica held it."""
    seconds: float
    """Until the previous one was forgotten."""


def promote(config: Config) -> PromoteResult:
    """Serve the release of `config` in place of the one that is served, on every replica, without a request failing.

    Every replica loads it beside the old one; then the gateways turn to it; when no request is left that began
    before, the old one is forgotten. Killed at any moment, the same command again completes it. Raises InputError if
    the release is not complete or does not fit the endpoint, or if there is no endpoint; what is served then stays.
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
    old, *others = file.read()
    if any(other.version not in (old.version, release.version) for other in others):  # of one that was killed
        _leave(gateway, file, old)
    file.write([old, release])
    try:
        _hold(parts * 2, [old.version, release.version])  # again for replicas that were starting
    except RayError:
        file.write([old])
        raise
    loaded = time.monotonic()
    if old.version != release.version:
        file.write([release, old])
        _leave(gateway, file, release)
    file.write([release])
    _hold(parts, [release.version])
    return PromoteResult(
        version=release.version,
        previous=old.version,
        index=release.index,
        load_seconds=round(loaded - started, 3),
        seconds=round(time.monotonic() - started, 3),
    )


def _leave(gateway: DeploymentHandle, file: ReleaseFile, served: Release) -> None:
    """Have every gateway turn to what is served now, and wait until no request is left that began with another."""
    _tell(gateway, "versions", lambda held: held[0] == served.version)
    settings = file.first.config.serve
    time.sleep(1 + max(settings.deadline_seconds, settings.beam_seconds if settings.beams else 0))


def _hold(parts: Sequence[DeploymentHandle], versions: list[str]) -> None:
    """Have every replica hold these and nothing else, the first one served."""
    for part in parts:
        _tell(part, "refresh", lambda held: held == list(dict.fromkeys(versions)))


def _tell(part: DeploymentHandle, method: str, done: Callable[[list[str]], bool]) -> None:
    """Have every replica of a deployment look what is to be held, until what it then holds is right.

    One that dies meanwhile is replaced, and its successor reads for itself.
    """
    for attempt in range(ATTEMPTS):
        try:
            held = part.broadcast(method).results(timeout_s=LOAD_SECONDS)
        except RayError as error:
            if isinstance(error, InputError) or attempt == ATTEMPTS - 1:
                raise
        else:
            if all(map(done, held)):
                return
        time.sleep(1)
    raise InputError("another promotion is under way; run the same command again when it is done")


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"serve.port={port}: cannot listen on {host}:{port} ({error.strerror})") from None
