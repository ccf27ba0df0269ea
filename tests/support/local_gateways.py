"""Gateways of both layouts in this process, whose replicas are objects instead of Ray actors."""

import contextlib
import inspect
from collections.abc import AsyncIterator
from typing import Any

from httpx2 import ASGITransport, AsyncClient

from l2d_ray.config import Config
from l2d_ray.distributed.serving.colocated import ColocatedGateway
from l2d_ray.distributed.serving.deployments import new_release_file
from l2d_ray.distributed.serving.encoders import Encoder
from l2d_ray.distributed.serving.gateway import Gateway
from l2d_ray.distributed.serving.recommenders import Recommenders
from l2d_ray.distributed.serving.shards import MemoryShard
from l2d_ray.serve.release_cache import ReleaseReplica
from l2d_ray.serve.releases import ReleaseFile
from support.fake_handles import FakeHandle

LAYOUTS = ("colocated", "distributed")
PATIENT = {"shard_seconds": 60, "deadline_seconds": 120}
"""Limits that a busy machine keeps, too."""


def release_file(config: Config, **settings: Any) -> ReleaseFile:
    """Return the release file of an endpoint with these settings of `serve`, and limits that are not exceeded."""
    return new_release_file(config.replace({f"serve.{name}": value for name, value in (PATIENT | settings).items()}))


def handle_of(replica: ReleaseReplica) -> FakeHandle:
    """Return a handle that calls this replica, whatever the session."""

    class Handle(FakeHandle):
        def options(self, **_: Any) -> FakeHandle:
            return self

    return Handle(**dict(inspect.getmembers(replica, inspect.iscoroutinefunction)))


async def open_gateway(layout: str, file: ReleaseFile) -> tuple[Gateway, Encoder]:
    """Return a gateway with the recommenders of the release, and its encoder. Distributed, each shard has a group."""
    others = handle_of(Recommenders(file)) if file.first.recommenders else None
    if layout == "colocated":
        colocated = ColocatedGateway.__new__(ColocatedGateway)
        await colocated.__init__(file, False, None, others, None)  # type: ignore[misc, arg-type]
        return colocated, colocated._components.encoder
    encoder, shards = Encoder(file), len(file.first.open().manifest.shards)
    groups = [handle_of(MemoryShard(file, number, shards)) for number in range(shards)]
    gateway = Gateway.__new__(Gateway)
    await gateway.__init__(file, False, handle_of(encoder), groups, None, others, None)  # type: ignore[misc, arg-type]
    return gateway, encoder


@contextlib.asynccontextmanager
async def serving(layout: str, file: ReleaseFile) -> AsyncIterator[tuple[AsyncClient, Gateway, Encoder]]:
    """Serve a release over HTTP, without a socket; give a client, the gateway and its encoder."""
    gateway, encoder = await open_gateway(layout, file)
    try:
        async with AsyncClient(
            transport=ASGITransport(gateway.__serve_build_asgi_app__()), base_url="http://x"
        ) as http:
            yield http, gateway, encoder
    finally:
        file.delete()
