"""Replicas of the recommenders next to L2D, without Ray."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from support.fake_handles import FakeHandle
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.distributed.serving.encoders import BROKEN_BATCHES
from l2d_ray.distributed.serving.recommenders import Recommenders
from l2d_ray.distributed.serving.replicas import Replicas
from l2d_ray.recommenders.contract import Recommender
from l2d_ray.serve.engine import OverloadedError, UnavailableError
from l2d_ray.serve.release_cache import VersionError
from l2d_ray.serve.releases import Release, ReleaseFile

NAMES = ["transitions", "most-popular"]
QUERIES = [Query.after([item, item + 1], 5) for item in range(20)]


@pytest.fixture
def file(engine: LocalEngine) -> ReleaseFile:
    return ReleaseFile(engine.config.workspace, "serving/me.json", Release.plan(engine.config, NAMES))


@dataclass(frozen=True)
class Broken(Recommender):
    """A recommender that fails once it may go on."""

    gate: threading.Event

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        self.gate.wait(10)
        raise ValueError("broken")


def test_each_query_is_answered_by_the_named_recommender(engine: LocalEngine, file: ReleaseFile) -> None:
    engine.offer(*NAMES)

    async def scenario() -> None:
        replica, version = Recommenders(file), file.first.version
        asked = [(name, query) for query in QUERIES for name in NAMES]
        answers = await asyncio.gather(*(replica.recommend(version, name, query, 10) for name, query in asked))
        for (name, query), answer in zip(asked, answers, strict=True):
            (expected,) = engine.others[name].recommend([query])
            assert answer is not None
            assert answer.items_I.tolist() == expected.items_I.tolist()
        with pytest.raises(VersionError):
            await replica.recommend("other", "transitions", QUERIES[0], 10)
        with pytest.raises(VersionError):
            await replica.recommend(version, "sasrec", QUERIES[0], 10)
        await replica.check_health()

    asyncio.run(scenario())


def test_a_promotion_makes_the_recommenders_of_the_new_release(file: ReleaseFile) -> None:
    async def scenario() -> None:
        replica, newer = Recommenders(file), Release.plan(file.first.config, ["transitions"])
        file.write([newer])
        try:
            assert await replica.refresh() == [newer.version]
            assert await replica.recommend(newer.version, "transitions", QUERIES[0], 10)
        finally:
            file.delete()

    asyncio.run(scenario())


def test_a_recommender_that_fails_or_has_no_time_leaves_the_others_alone(
    file: ReleaseFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, made = threading.Event(), Release.make_recommenders
    monkeypatch.setattr(Release, "make_recommenders", lambda release: made(release) | {"broken": Broken(gate)})

    async def scenario() -> None:
        replica, version = Recommenders(file), file.first.version
        waiting = asyncio.create_task(replica.recommend(version, "broken", QUERIES[0], 10))
        await asyncio.sleep(0.1)
        assert await replica.recommend(version, "broken", QUERIES[1], 0.05) is None
        assert await replica.recommend(version, "transitions", QUERIES[0], 10)
        gate.set()
        await asyncio.gather(waiting, return_exceptions=True)
        for _ in range(BROKEN_BATCHES - 1):
            await replica.check_health()
            await asyncio.gather(replica.recommend(version, "broken", QUERIES[0], 10), return_exceptions=True)
        with pytest.raises(RuntimeError, match="batches failed"):
            await replica.check_health()

    asyncio.run(scenario())


def test_a_gateway_refuses_what_is_not_served_late_or_away() -> None:
    async def late(version: str, name: str, query: Query, within: float) -> None:
        assert 0 < within <= 3
        return

    async def away(version: str, name: str, query: Query, within: float) -> None:
        raise VersionError

    settings = ServeConfig(deadline_seconds=3)
    for handle, error, message in (
        (None, UnavailableError, "only L2D is served here"),
        (FakeHandle(recommend=late), OverloadedError, "too many requests are waiting for sasrec; try again later"),
        (FakeHandle(recommend=away), UnavailableError, "sasrec is unavailable; try again later"),
    ):
        called = Replicas(FakeHandle(), [], None, settings, handle)
        with pytest.raises(error, match=message):
            asyncio.run(called.recommend_by("v", "sasrec", QUERIES[0]))
