"""Private names of Ray that serving uses, as seen in Ray 2.60.0. Another version may lack any of them.

No other module of this folder uses a private Python name of Ray. `ray_variables.py` has the environment variables.
"""

import uuid
from typing import Any

from ray.serve.context import _get_global_client, _set_request_context
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle


class RankingRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Ray Serve's consistent-hash router, with a ranking that a subclass may override."""

    def ranked_replicas(self, key: str) -> list[Any]:
        """Return replicas in the order in which a request tries them. `key` is its session, or else unique to it."""
        ranked: list[Any] = super()._lookup_ranked_replicas(key)
        return ranked

    def _lookup_ranked_replicas(self, routing_key: str) -> list[Any]:
        return self.ranked_replicas(routing_key)


def by_grpc(handle: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose small replies come straight by gRPC, not through Ray's object store."""
    return handle.options(_by_reference=False)


def distinguish_calls() -> None:
    """Give the next calls of this task a new id.

    The requests of a batch share the id of their HTTP request, by which Ray's router tells requests apart.
    """
    _set_request_context(_internal_request_id=uuid.uuid4().hex)


def serve_address() -> tuple[str, int] | None:
    """Return the host and port of the Ray Serve that runs on this Ray, or None if none runs."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)
