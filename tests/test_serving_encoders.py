"""Replicas that hold a model: their health, and beam searches whose callers have left."""

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.served_items import BEAMS
from support.small_endpoint import LocalEngine, grow_endpoint, write_endpoint
from support.small_workspace import ITEM_COUNT

from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.distributed.serving import encoders
from l2d_ray.distributed.serving.deployments import new_release_file
from l2d_ray.distributed.serving.encoders import BROKEN_BATCHES, BeamSearcher, Encoder
from l2d_ray.distributed.serving.metrics import EncoderMetrics
from l2d_ray.recommenders.constrained_beam import _AlongTrie
from l2d_ray.serve.batching import TokenBatcher
from l2d_ray.serve.release_cache import ReleaseCache
from l2d_ray.serve.releases import Release, ReleaseFile

RELEASE = Release(settings=Config().model_dump(mode="json"), index="index", manifest="manifest")


class EmptyEncoder:
    """Encoder that has cached nothing."""

    cache = SimpleNamespace(bytes=0)


def replica(kind: type[Encoder] | type[BeamSearcher], folder: Path, batcher: TokenBatcher[int, int]) -> Any:
    """Return a replica whose model is only a queue."""
    made = kind.__new__(kind)
    file, model = ReleaseFile(str(folder), "serving/me.json", RELEASE), encoders._Model(None, EmptyEncoder(), batcher)  # type: ignore[arg-type]
    made.cache = ReleaseCache(file, lambda _: model)
    vars(made).update(_metrics=EncoderMetrics(), _batcher=batcher, _max_seconds=0.1)
    return made


def test_gateways_shards_and_promotions_start_without_the_libraries_of_the_model() -> None:
    modules = (f"l2d_ray.distributed.serving.{name}" for name in ("gateway", "shards", "promotion"))
    program = f"import sys, {', '.join(modules)}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize("kind", [Encoder, BeamSearcher])
def test_a_replica_whose_model_hangs_is_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Encoder] | type[BeamSearcher]
) -> None:
    monkeypatch.setattr(encoders, "HUNG_SECONDS", 0.1)
    gate = threading.Event()

    def run(items: list[int]) -> list[int]:
        gate.wait(10)
        return items

    async def scenario() -> None:
        batcher = TokenBatcher(run, abs, 10)
        checked = replica(kind, tmp_path, batcher)
        waiting = asyncio.create_task(batcher(1))
        await asyncio.sleep(0)
        await checked.check_health()
        await asyncio.sleep(0.2)
        with pytest.raises(RuntimeError, match="one batch for more than"):
            await checked.check_health()
        gate.set()
        await waiting
        await checked.check_health()

    asyncio.run(scenario())


def test_a_replica_whose_last_batches_all_failed_is_unhealthy(tmp_path: Path) -> None:
    def run(items: list[int]) -> list[int]:
        if 0 in items:
            raise ValueError
        return items

    async def scenario() -> None:
        batcher = TokenBatcher(run, abs, 10)
        checked = replica(Encoder, tmp_path, batcher)
        for item in [0] * (BROKEN_BATCHES - 1) + [1] + [0] * (BROKEN_BATCHES - 1):
            await asyncio.gather(batcher(item), return_exceptions=True)
            await checked.check_health()  # a few failures may be due to the items
        await asyncio.gather(batcher(0), return_exceptions=True)
        with pytest.raises(RuntimeError, match=f"the last {BROKEN_BATCHES} batches failed"):
            await checked.check_health()

    asyncio.run(scenario())


def test_a_beam_search_stops_when_its_caller_leaves(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], _AlongTrie.__call__

    def slow_step(self: _AlongTrie, *arguments: Any) -> Any:
        steps.append(self)
        time.sleep(0.05)
        return step(self, *arguments)

    async def first_step() -> None:
        while not steps:
            await asyncio.sleep(0.01)

    async def scenario() -> ScoredItems:
        file = new_release_file(engine.config)
        searcher = BeamSearcher(file, BEAMS)
        version, queries = file.first.version, [Query.after([n], 10) for n in range(3)]
        searches = [asyncio.create_task(searcher.recommend(version, query)) for query in queries]
        await first_step()
        for search in searches[:2]:
            search.cancel()
        found = await searches[2]
        assert len(set(steps)) == 2  # the first and the third search; the second had not begun
        assert steps.count(steps[0]) <= 2 < steps.count(steps[-1])
        for _ in range(BROKEN_BATCHES):
            steps.clear()
            search = asyncio.create_task(searcher.recommend(version, queries[0]))
            await first_step()
            search.cancel()
            while searcher._batcher.running_seconds():
                await asyncio.sleep(0.01)
        await searcher.check_health()  # an abandoned search is no failure
        return found

    monkeypatch.setattr(_AlongTrie, "__call__", slow_step)
    found = asyncio.run(scenario())
    monkeypatch.undo()
    engine.beams = BEAMS
    assert found.items_I.tolist() == engine.beam_answer(Query.after([2], 10)).items_I.tolist()


def test_releases_that_differ_in_the_index_alone_share_a_model(engine: LocalEngine) -> None:
    async def scenario() -> None:
        file = new_release_file(engine.config)
        searcher = BeamSearcher(file, BEAMS)
        settings = file.first.settings
        other = file.first.model_copy(update={"settings": settings | {"index": settings["index"] | {"prior": 7.0}}})
        file.write([file.first, other])
        try:
            await searcher.refresh()
        finally:
            file.delete()
        first, second = searcher.cache.contents()
        assert first is second

    asyncio.run(scenario())


def test_releases_of_a_memory_that_grew_share_the_model(tmp_path: Path) -> None:
    config = write_endpoint(tmp_path)
    file = new_release_file(config)
    grow_endpoint(config)
    newer, new_item = new_release_file(config).first, ITEM_COUNT

    async def scenario() -> None:
        replica = Encoder(file)
        before = await replica.encode(file.first.version, [0, 1], 10)
        file.write([file.first, newer])
        assert await replica.refresh() == [file.first.version, newer.version]
        (model,) = set(replica.cache.contents())
        assert await replica.encode(newer.version, [0, new_item], 10) is not None
        file.write([newer])
        await replica.refresh()
        after = await replica.encode(newer.version, [0, 1], 10)
        assert before is not None
        assert after is not None
        assert before == pytest.approx(after, rel=1e-4, abs=1e-5)
        assert set(replica.cache.contents()) == {model}

    asyncio.run(scenario())
