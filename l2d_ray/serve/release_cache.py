"""The content of releases that one replica keeps in memory, in step with the endpoint's release file."""

import asyncio
import logging
from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any, Generic, TypeVar

from l2d_ray.serve.releases import Release, ReleaseFile

T = TypeVar("T")
logger = logging.getLogger(__name__)


class VersionError(Exception):
    """A request for a release that the replica does not hold and cannot load, or that the file does not name."""


class ReleaseCache(Generic[T]):
    """The loaded content of each release that the release file names: a model, shards, or what else a replica needs."""

    def __init__(
        self,
        file: ReleaseFile,
        load: Callable[[Release], T],
        origin: Callable[[Release], Hashable] = attrgetter("version"),
    ) -> None:
        """Load all releases that the file names. Releases of equal `origin` share their content.

        Raises what `load` or `origin` raise, such as InputError, if the served release cannot be loaded.
        """
        self._file, self._load, self._origin = file, load, origin
        self._contents: dict[str, tuple[Hashable, T]] = {}
        """Origin and content of each release, by version."""
        self._lock = asyncio.Lock()
        self.served = ""
        """Version of the release that is served."""
        self._start()

    async def get(self, version: str) -> T:
        """Return the content of a release, after loading it if the file names it.

        Raises VersionError if it does not, or if the release cannot be loaded.
        """
        if version not in self._contents:
            try:
                await self.refresh()
            except Exception as error:  # also a MemoryError
                logger.warning("cannot load release %s: %s", version, error)
        if version not in self._contents:
            raise VersionError
        return self._contents[version][1]

    def versions(self) -> list[str]:
        """Return the versions of all loaded releases, the served one first."""
        return [self.served, *(self._contents.keys() - {self.served})]

    def contents(self) -> list[T]:
        """Return the contents of all loaded releases."""
        return [content for _, content in self._contents.values()]

    def current(self) -> T:
        """Return the content of the served release."""
        return self._contents[self.served][1]

    async def refresh(self) -> list[str]:
        """Load what the file names, drop what it does not, and return the loaded versions, the served one first.

        Requests are answered meanwhile. Loading continues if the caller is cancelled. If a release cannot be loaded,
        the others are; then the error of `load` is raised.
        """
        await asyncio.shield(asyncio.ensure_future(self._refresh()))
        return self.versions()

    async def _refresh(self) -> None:
        async with self._lock:
            await asyncio.to_thread(self._load_named)

    async def refresh_quietly(self) -> None:
        """Refresh, and log a failure instead of raising it.

        A replica calls this periodically, because it may have been starting when a promotion told all replicas.
        """
        if self._lock.locked():
            return
        try:
            await self.refresh()
        except Exception as error:  # also a MemoryError
            logger.warning("cannot load a release, keep serving the loaded ones: %s", error)

    def _start(self) -> None:
        """Load the served release, or raise; load the others if possible."""
        for _ in range(2):  # twice, because the file may change during the first load
            try:
                self._load_named()
            except Exception as error:
                if not self._contents:
                    raise
                logger.warning("loaded the served release, cannot load another one: %s", error)

    def _load_named(self) -> None:
        releases = self._file.read()
        failure: Exception | None = None
        contents: dict[str, tuple[Hashable, T]] = {}
        for release in releases:
            loaded = dict([*self._contents.values(), *contents.values()])
            try:
                contents[release.version] = self._contents.get(release.version) or self._content(release, loaded)
            except Exception as error:
                if not contents:  # the served release
                    raise
                failure = error
        # In this order, `current` finds the content of `served` at every moment.
        self._contents = self._contents | contents  # a new one: others may go through the old one
        self.served = releases[0].version
        self._contents = contents
        if failure:
            raise failure

    def _content(self, release: Release, loaded: dict[Hashable, T]) -> tuple[Hashable, T]:
        origin = self._origin(release)
        return origin, loaded[origin] if origin in loaded else self._load(release)


class ReleaseReplica:
    """Base class of the replicas: each holds some content of every release."""

    cache: ReleaseCache[Any]

    async def refresh(self) -> list[str]:
        """Load what the release file names and return the loaded versions (`ReleaseCache.refresh`)."""
        return await self.cache.refresh()

    async def versions(self) -> list[str]:
        """Return the loaded versions, the served one first, after a refresh whose failure is only logged."""
        await self.cache.refresh_quietly()
        return self.cache.versions()

    async def check_health(self) -> None:
        """Start a refresh. Ray Serve calls this every few seconds and replaces the replica if it raises."""
        self._refreshing = asyncio.ensure_future(self.cache.refresh_quietly())
