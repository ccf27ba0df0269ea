"""Replicas that speak HTTP. They import no torch, which costs seconds and memory."""

import asyncio

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.distributed.serving.components import Components
from l2d_ray.distributed.serving.ray_release import RayRelease
from l2d_ray.distributed.serving.replicas import Replicas
from l2d_ray.errors import InputError
from l2d_ray.serve.api import create_app
from l2d_ray.serve.engine import ServedRelease
from l2d_ray.serve.release_cache import ReleaseCache, ReleaseReplica
from l2d_ray.serve.releases import ReleaseFile
from l2d_ray.serve.security import KEYS_VARIABLE, Keys


def keys_of(settings: ServeConfig) -> Keys:
    """Return the keys that clients may use."""
    return Keys(KEYS_VARIABLE, settings.keys_file)


class Gateway(ReleaseReplica):
    """A replica with the HTTP application, and the `Engine` of that application."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        file: ReleaseFile,
        needs_key: bool,
        encoder: DeploymentHandle,
        shard_groups: list[DeploymentHandle],
        beams: DeploymentHandle | None,
        recommenders: DeploymentHandle | None,
        _follower: DeploymentHandle | None,
    ) -> None:
        """Wait until the model and every shard group have loaded the served release.

        `needs_key`: whether keys are set where the endpoint was started. The gateway never calls the follower: Ray
        Serve starts what an ingress has a handle of. Raises InputError if the keys are not set on this node or cannot
        be read, or if the release is missing or damaged.
        """
        self._open(file, needs_key)
        replicas = Replicas(encoder, shard_groups, beams, self._settings, recommenders)
        await self._load(replicas)
        await replicas.wait_for_release(self.cache.served)

    def _open(self, file: ReleaseFile, needs_key: bool) -> None:
        """Take settings and keys. Raises InputError if the keys are not set on this node or cannot be read."""
        self._file, self._settings = file, file.first.config.serve
        self._keys = keys_of(self._settings)
        self._keys.check()
        if needs_key and not self._keys.required():
            raise InputError(
                f"{KEYS_VARIABLE}: not set on this node, but set where the endpoint was started; set it on every node"
                " before `ray start`"
            )

    async def _load(self, components: Components) -> None:
        """Load what a gateway needs of the releases, which `components` answer."""
        self.cache = await asyncio.to_thread(ReleaseCache, self._file, lambda release: RayRelease(release, components))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings, self._keys)

    def current(self) -> ServedRelease:
        """Return the release that is served now."""
        served: ServedRelease = self.cache.current()
        return served

    def file(self) -> ReleaseFile:
        """Return the release file, in which a promotion names a new release."""
        return self._file
