"""Which release an endpoint serves, and what its replicas hold of each.

A release is a configuration and the index that it names. The replicas of an endpoint agree by one file of the
workspace: the first release in it is served, the others are to be held beside it. A new one is served in three steps
(`distributed/serving/promotion.py`):
named beside the old one, so that every replica loads it; named first, so that the gateways turn to
it; alone, once no request is left that began before. Where there is no file, the release of the start is served.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

import pyarrow as pa

from l2d_ray.config import Config
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.sharding import IndexReader
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import Record
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.settings import for_queries
from l2d_ray.workspace import Workspace

T = TypeVar("T")
logger = logging.getLogger(__name__)


class VersionError(Exception):
    """A replica is asked for a release that it does not hold and is not to load."""


class Release(Record):
    """One version of what is served."""

    settings: dict[str, Any]
    """The configuration, as JSON."""
    index: str
    """Path of the index's manifest in the configuration's workspace."""
    manifest: str
    """Digest of that manifest."""

    @classmethod
    def plan(cls, config: Config) -> "Release":
        """The release of a configuration. Raises InputError if it has no index or no items.

        Whether the model is the one that the index's memory was made with, shows what loads it.
        """
        config = for_queries(config)
        workspace, path = Workspace.open(config.workspace), plan_index(config).manifest
        if not workspace.exists(path):
            raise InputError(f"{workspace.path(path)}: not found; run jobs/build_index.py with the same settings first")
        manifest = IndexReader.open(workspace, path).manifest.digest()
        release = cls(settings=config.model_dump(mode="json"), index=path, manifest=manifest)
        release.items()
        return release

    @property
    def config(self) -> Config:
        """The configuration."""
        return Config(**self.settings)

    @property
    def version(self) -> str:
        """What tells it from every other: of all that decides an answer, and of what replicas load to give it."""
        index = self.config.index
        parts = {name: self.settings[name] for name in ("history", "model", "prompt", "recommend")}
        decisive = [self.manifest, index.prior_in(index.space), parts]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]

    def open(self) -> IndexReader:
        """Its index. Raises InputError if that is damaged, or another than it was."""
        workspace = Workspace.open(self.config.workspace)
        reader = IndexReader.open(workspace, self.index)
        if reader.manifest.digest() != self.manifest:
            raise InputError(f"{workspace.path(self.index)}: was replaced since it was first served")
        return reader

    def items(self) -> pa.Table:
        """Ids and titles (`schema.ITEMS`), as the memory keeps them. Raises InputError if they are not there."""
        workspace = Workspace.open(self.config.workspace)
        return MemoryStore(workspace).items(IndexManifest.read(workspace, self.index).dataset)


class ReleaseList(Record):
    """The file: what is served first, then what is to be held beside it."""

    releases: list[Release]


@dataclass(frozen=True)
class ReleaseFile:
    """Where the replicas of one endpoint look."""

    uri: str
    """Of the workspace that the endpoint was started with."""
    path: str
    """In it."""
    first: Release
    """Served while there is no file."""

    def read(self) -> list[Release]:
        """The release that is served, then those to be held beside it."""
        workspace = Workspace.open(self.uri)
        if not workspace.exists(self.path):
            return [self.first]
        return ReleaseList.read(workspace, self.path).releases

    def write(self, releases: Sequence[Release]) -> None:
        """Raises OSError if the workspace cannot be written to."""
        Workspace.open(self.uri).write_json(self.path, ReleaseList(releases=list(releases)).model_dump())

    def delete(self) -> None:
        """What is left when the endpoint has stopped."""
        Workspace.open(self.uri).delete(self.path)


class Held(Generic[T]):
    """What one replica holds of each release that the file names."""

    def __init__(
        self,
        file: ReleaseFile,
        load: Callable[[Release], T],
        origin: Callable[[Release], Hashable] = attrgetter("version"),
    ) -> None:
        """Load all that the file names; releases of one `origin` share a part. Both may raise InputError."""
        self._file, self._load, self._origin = file, load, origin
        self._parts: dict[str, tuple[Hashable, T]] = {}
        self._lock = asyncio.Lock()
        self.served = ""
        """The version that is served."""
        self._start()

    async def get(self, version: str) -> T:
        """The part of a release, loaded if the file names it. Raises VersionError if it does not."""
        if version not in self._parts:
            await self.refresh()
        if version not in self._parts:
            raise VersionError
        return self._parts[version][1]

    def versions(self) -> list[str]:
        """All that are held, the served one first."""
        return [self.served, *(self._parts.keys() - {self.served})]

    def parts(self) -> list[T]:
        """All that is held."""
        return [part for _, part in self._parts.values()]

    def current(self) -> T:
        """The part of the release that is served."""
        return self._parts[self.served][1]

    async def refresh(self) -> list[str]:
        """Load what the file names, forget what it does not. The versions held, the served one first.

        Requests go on meanwhile, and so does it if its caller leaves. Raises what loading raises if it cannot; of what
        the file names it then holds what it can.
        """
        await asyncio.shield(asyncio.ensure_future(self._refresh()))
        return self.versions()

    async def _refresh(self) -> None:
        async with self._lock:
            await asyncio.to_thread(self._follow)

    async def refresh_quietly(self) -> None:
        """`refresh` now and then, for a replica that was starting when the others were told."""
        if self._lock.locked():
            return
        try:
            await self.refresh()
        except Exception as error:  # of memory, too: what is held goes on
            logger.warning("what is to be served cannot be loaded: %s", error)

    def _start(self) -> None:
        """Load what is served, without which it cannot start, and the others if they are good."""
        for _ in range(2):  # again for what was named while the first was loading
            try:
                self._follow()
            except Exception as error:
                if not self._parts:
                    raise
                logger.warning("started without what is to be held besides: %s", error)

    def _follow(self) -> None:
        releases = self._file.read()
        failure: Exception | None = None
        parts: dict[str, tuple[Hashable, T]] = {}
        for release in releases:
            held = [*self._parts.values(), *parts.values()]
            try:
                parts[release.version] = self._parts.get(release.version) or self._part(release, dict(held))
            except Exception as error:
                if not parts:  # the one that is served
                    raise
                failure = error
        # In this order: whoever asks meanwhile finds the part of `served`.
        self._parts |= parts
        self.served = releases[0].version
        self._parts = parts
        if failure:
            raise failure

    def _part(self, release: Release, held: dict[Hashable, T]) -> tuple[Hashable, T]:
        origin = self._origin(release)
        return origin, held[origin] if origin in held else self._load(release)


class Part:
    """A replica that holds something of each release."""

    held: Held[Any]

    async def refresh(self) -> list[str]:
        """As of `Held`."""
        return await self.held.refresh()

    async def versions(self) -> list[str]:
        """What it holds, after it looked again as far as it can."""
        await self.held.refresh_quietly()
        return self.held.versions()

    async def check_health(self) -> None:
        """Ray Serve calls it every few seconds. Raise if the replica is to be replaced."""
        self._refreshing = asyncio.ensure_future(self.held.refresh_quietly())
