"""Start and stop of an endpoint."""

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
from ray.serve.schema import LoggingConfig

from l2d_ray.config import Config, ServeConfig
from l2d_ray.distributed.screen import say
from l2d_ray.distributed.serving.deployments import application, new_release_file
from l2d_ray.distributed.serving.gateway import keys_of
from l2d_ray.distributed.serving.promotion import APPLICATION
from l2d_ray.distributed.serving.ray_private import serve_address
from l2d_ray.distributed.workers import check_room
from l2d_ray.errors import InputError, input_error_in
from l2d_ray.serve.recommenders import runs_model
from l2d_ray.serve.security import KEYS_VARIABLE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
REPORT_SECONDS = 10
"""Seconds between reports on a start that has not finished."""


@dataclass(frozen=True)
class ServeResult:
    """An endpoint that has been stopped."""

    url: str
    """Address that it listened on."""
    seconds: float
    """Seconds that it was up."""


def serve_until_stopped(config: Config) -> ServeResult:
    """Serve until SIGINT or SIGTERM. Raises InputError if the endpoint cannot start (`endpoint`)."""
    stop = threading.Event()
    with endpoint(config) as url:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        started = time.monotonic()
        _print_addresses(url)
        stop.wait()
    return ServeResult(url, round(time.monotonic() - started, 3))


@contextmanager
def endpoint(config: Config) -> Iterator[str]:
    """Run an endpoint on `serve.host` and `serve.port` while the block runs, and give its URL. Needs a running Ray.

    Raises InputError if the release is not complete, if a replica cannot load it, if its models do not fit on the Ray
    of this machine, if other machines could reach it without a key, or if this Ray has an endpoint already.
    """
    settings = config.serve
    if settings.host not in LOOPBACK and not keys_of(settings).required():
        raise InputError(
            f"serve.host={settings.host!r}: other machines could reach the endpoint without a key; set serve.keys_file"
            f" or {KEYS_VARIABLE}, or listen on 127.0.0.1"
        )
    file = new_release_file(config)
    app = application(file, config)
    _check_address(settings)
    models = settings.encoders * (1 + runs_model(file.first.recommenders, config)) + bool(settings.beams)
    check_room(config, models, "serve.encoders")
    http_options = {"host": settings.host, "port": settings.port}
    serve.start(http_options=http_options, logging_config=LoggingConfig(encoding="JSON"))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say("loading model and index")
    try:
        with _progress_reports():
            try:
                serve.run(app, name=APPLICATION, route_prefix="/")
            except RuntimeError as error:
                raise input_error_in(_messages()) or error from None
        yield f"http://{host}:{settings.port}"
    finally:
        serve.delete(APPLICATION)  # only this application: others may use the same Ray Serve
        file.delete()


def _print_addresses(url: str) -> None:
    """Print where the endpoint and its metrics are, and the command that promotes another release."""
    here = ray.get_runtime_context()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
    variables = {"RAY_ADDRESS": here.gcs_address}
    if "RAY_AUTH_MODE" in os.environ:  # otherwise Ray takes the token from the user's home
        variables["RAY_AUTH_MODE"] = os.environ["RAY_AUTH_MODE"]
    promote = [*(f"{name}={value}" for name, value in variables.items()), "python jobs/promote.py …"]
    lines = [
        f"serving at {url} (page) and {url}/docs (API)",
        f"metrics for Prometheus: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
        f"to serve another release: {' '.join(promote)}",
        "to stop: Ctrl-C",
    ]
    say("\n".join(lines))


@contextmanager
def _progress_reports() -> Iterator[None]:
    """Print the messages of the deployments while the block runs: Ray Serve waits for them without a limit."""
    ready = threading.Event()

    def report() -> None:
        printed = ""
        while not ready.wait(REPORT_SECONDS):
            messages = _messages()
            if messages != printed:
                say(f"not ready: {input_error_in(messages) or messages}")
                printed = messages

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        ready.set()


def _messages() -> str:
    """Return the messages of the deployments that are not ready."""
    status = serve.status().applications.get(APPLICATION)
    return "; ".join(one.message for one in status.deployments.values() if one.message) if status else ""


def _check_address(settings: ServeConfig) -> None:
    """Raise InputError if the endpoint cannot listen on its address, or if this Ray has one already."""
    running = serve_address()
    if running is None:
        _check_port(settings.host, settings.port)
    elif APPLICATION in serve.status().applications:
        raise InputError(
            "an endpoint runs on this Ray already; run jobs/promote.py to change what it serves, or `serve shutdown` to"
            " stop it"
        )
    elif running != (settings.host, settings.port):
        host, port = running
        raise InputError(
            f"serve.host={settings.host!r}, serve.port={settings.port}: Ray Serve runs on this Ray already, at"
            f" {host}:{port}; set serve.host and serve.port to that address, or stop it with `serve shutdown`"
        )


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"serve.port={port}: cannot listen on {host}:{port} ({error.strerror}); set another port"
            ) from None
