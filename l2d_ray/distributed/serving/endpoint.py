"""Starting an endpoint, and stopping it."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from l2d_ray.config import Config
from l2d_ray.distributed.screen import say, stderr
from l2d_ray.distributed.serving.deployments import application, start_of
from l2d_ray.distributed.serving.gateway import keys_of
from l2d_ray.distributed.serving.promotion import APPLICATION
from l2d_ray.distributed.workers import check_room
from l2d_ray.errors import InputError, input_error_in
from l2d_ray.serve.api import KEYS_VARIABLE

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
        here = ray.get_runtime_context()
        (node,) = (node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
        this_ray = {"RAY_ADDRESS": here.gcs_address}
        if "RAY_AUTH_MODE" in os.environ:  # a Ray of this machine alone asks for the token of the user's home
            this_ray["RAY_AUTH_MODE"] = os.environ["RAY_AUTH_MODE"]
        print(
            f"serving at {url} (page), {url}/docs (interface), metrics of this node for Prometheus at",
            f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics; Ctrl-C stops; to serve another",
            "release instead:",
            *(f"{name}={value}" for name, value in this_ray.items()),
            "python jobs/promote.py …",
            file=stderr(),
        )
        stop.wait()
    return ServeResult(url, round(time.monotonic() - started, 3))


@contextmanager
def endpoint(config: Config) -> Iterator[str]:
    """The URL of an endpoint on `serve.host` and `serve.port`, that stops with the block. Needs a Ray.

    Raises InputError if there is nothing to serve, if a replica cannot load it, if its models do not fit on the Ray of
    this machine alone, if it would be open to other machines without a key, or if this Ray has an endpoint already.
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
    elif APPLICATION in serve.status().applications:
        raise InputError(
            "an endpoint runs on this Ray already: jobs/promote.py changes what it serves, `serve shutdown` ends it"
        )
    elif (running.http_config.host, running.http_config.port) != (settings.host, settings.port):
        raise InputError(
            f"Ray Serve runs on this Ray already, at {running.http_config.host}:{running.http_config.port}, which it"
            " keeps: set serve.host and serve.port to that, or end it with `serve shutdown`"
        )
    check_room(config, settings.encoders + bool(settings.beams), "serve.encoders")
    http_options = {"host": settings.host, "port": settings.port}
    serve.start(http_options=http_options, logging_config=LoggingConfig(encoding="JSON"))
    ready = threading.Event()
    threading.Thread(target=_say_what_is_missing, args=[ready], daemon=True).start()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        try:
            serve.run(app, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise input_error_in(_complaints()) or error from None
        finally:
            ready.set()
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
            say(f"not ready: {input_error_in(missing) or missing}")
            said = missing


def _complaints() -> str:
    """What the deployments say that are not ready."""
    found = serve.status().applications.get(APPLICATION)
    return "; ".join(part.message for part in found.deployments.values() if part.message) if found else ""


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"serve.port={port}: cannot listen on {host}:{port} ({error.strerror})") from None
