"""The releases that a replica holds, in step with the release file."""

import asyncio
import time
from pathlib import Path

import pytest

from l2d_ray.config import Config
from l2d_ray.errors import InputError
from l2d_ray.serve.release_cache import ReleaseCache, VersionError
from l2d_ray.serve.releases import Release, ReleaseFile

FIRST, SECOND, DAMAGED = (
    Release(settings=Config().model_dump(mode="json"), index=name, manifest=name)
    for name in ("first", "second", "damaged")
)


def load(release: Release) -> str:
    if release.index == "damaged":
        raise InputError("damaged")
    return release.index


@pytest.fixture
def file(tmp_path: Path) -> ReleaseFile:
    return ReleaseFile(str(tmp_path), "serving/me.json", FIRST)


def test_the_cache_follows_the_file(file: ReleaseFile) -> None:
    async def scenario() -> None:
        cache = ReleaseCache(file, load)
        assert (cache.versions(), cache.current()) == ([FIRST.version], "first")
        file.write([FIRST, SECOND])
        assert await cache.get(SECOND.version) == "second"  # without a refresh before
        file.write([SECOND, FIRST])
        assert await cache.refresh() == [SECOND.version, FIRST.version]
        assert (cache.current(), await cache.get(FIRST.version)) == ("second", "first")
        file.write([SECOND])
        assert await cache.refresh() == [SECOND.version]
        with pytest.raises(VersionError):
            await cache.get(FIRST.version)

    asyncio.run(scenario())


def test_releases_of_one_origin_share_their_content(file: ReleaseFile) -> None:
    async def scenario() -> None:
        file.write([FIRST, SECOND])
        cache = ReleaseCache(file, lambda release: [release.index], lambda release: release.index == "damaged")
        assert await cache.get(FIRST.version) is await cache.get(SECOND.version)
        file.write([SECOND, DAMAGED])
        await cache.refresh()
        assert (await cache.get(SECOND.version), await cache.get(DAMAGED.version)) == (["first"], ["damaged"])

    asyncio.run(scenario())


def test_a_damaged_release_stops_nothing_unless_it_is_the_served_one(file: ReleaseFile) -> None:
    """A killed promotion may leave one in the file, and replicas that die afterwards must be replaced."""

    async def scenario() -> None:
        file.write([FIRST, DAMAGED])
        cache = ReleaseCache(file, load)
        assert cache.versions() == [FIRST.version]
        with pytest.raises(InputError, match="damaged"):
            await cache.refresh()
        with pytest.raises(VersionError):
            await cache.get(DAMAGED.version)
        file.write([DAMAGED, SECOND])
        with pytest.raises(VersionError):
            await cache.get(SECOND.version)
        file.write([SECOND, DAMAGED, FIRST])
        await cache.refresh_quietly()
        assert cache.versions() == [SECOND.version, FIRST.version]

    asyncio.run(scenario())
    file.write([DAMAGED, FIRST])
    with pytest.raises(InputError, match="damaged"):
        ReleaseCache(file, load)


def test_a_release_that_does_not_fit_in_memory_stops_nothing(file: ReleaseFile) -> None:
    def load_what_fits(release: Release) -> str:
        if release == SECOND:
            raise MemoryError
        return release.index

    async def scenario() -> None:
        file.write([FIRST, SECOND])
        cache = ReleaseCache(file, load_what_fits)
        await cache.refresh_quietly()
        assert (cache.versions(), cache.current()) == ([FIRST.version], "first")
        with pytest.raises(MemoryError):
            await cache.refresh()

    asyncio.run(scenario())


def test_a_release_is_loaded_once_although_its_first_caller_leaves(file: ReleaseFile) -> None:
    loads: list[str] = []

    def load_slowly(release: Release) -> str:
        loads.append(release.index)
        time.sleep(0.2)
        return release.index

    async def scenario() -> None:
        cache = ReleaseCache(file, load_slowly)
        file.write([FIRST, SECOND])
        call = asyncio.create_task(cache.get(SECOND.version))
        await asyncio.sleep(0.1)
        call.cancel()
        assert await cache.refresh() == [FIRST.version, SECOND.version]
        assert loads == ["first", "second"]

    asyncio.run(scenario())


def test_a_release_named_during_the_first_load_is_held_from_the_start(file: ReleaseFile) -> None:
    def load_and_name_another(release: Release) -> str:
        file.write([FIRST, SECOND])
        return release.index

    assert ReleaseCache(file, load_and_name_another).versions() == [FIRST.version, SECOND.version]
