"""The replicas that speak HTTP. They have no use for torch, which takes seconds to import, and memory."""

import asyncio

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.distributed.serving.replicas import Replicas, ServedRelease
from l2d_ray.errors import InputError
from l2d_ray.serve.api import KEYS_VARIABLE, create_app
from l2d_ray.serve.engine import Served
from l2d_ray.serve.releases import Held, Part, ReleaseFile
from l2d_ray.serve.security import Keys


def keys_of(settings: ServeConfig) -> Keys:
    """The keys that clients may use."""
    return Keys(KEYS_VARIABLE, settings.keys_file)


class Gateway(Part):
    """The HTTP interface, and the `Engine` behind it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        file: ReleaseFile,
        needs_key: bool,
        encoder: DeploymentHandle,
        shards: list[DeploymentHandle],
        beams: DeploymentHandle | None,
    ) -> None:
        """Ready when the model and every shard hold the release that this serves; else InputError says what is wrong.

        `needs_key`: whoever started this has keys, and this node must have them, too.
        """
        self._file, self._settings = file, file.first.config.serve
        self._keys = keys_of(self._settings)
        self._keys.check()
        if needs_key and not self._keys.required():
            raise InputError(f"{KEYS_VARIABLE} is not set on this node, but is where the endpoint was started")
        replicas = Replicas(encoder, shards, beams, self._settings)
        self.held = await asyncio.to_thread(Held, file, lambda release: ServedRelease(release, replicas))
        await replicas.agree(self.held.served)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings, self._keys)

    def current(self) -> Served:
        """As in `Engine`."""
        served: Served = self.held.current()
        return served

    def file(self) -> ReleaseFile:
        """Where a new release is to be named."""
        return self._file
