"""What a replica holds of each release that the file names, what is asked of others, and a model that hangs."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.small_endpoint import LocalEngine, write_endpoint

from l2d_ray.config import Config, ServeConfig
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.serving import encoders as models
from l2d_ray.distributed.serving import replicas
from l2d_ray.distributed.serving.encoders import BeamSearcher, Encoder
from l2d_ray.distributed.serving.replicas import Replicas, hops_of
from l2d_ray.errors import InputError
from l2d_ray.index.sharding import answers, run
from l2d_ray.serve.batching import TokenBatcher
from l2d_ray.serve.engine import OverloadedError, Query, UnavailableError
from l2d_ray.serve.releases import Held, Release, ReleaseFile, VersionError
from l2d_ray.workspace import Workspace

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


def test_gateways_shards_and_promotions_start_without_what_only_models_need() -> None:
    """In a process of its own: this one has read it all."""
    modules = (
        "l2d_ray.distributed.serving.gateway, l2d_ray.distributed.serving.shards, l2d_ray.distributed.serving.promotion"
    )
    needless = f"import sys, {modules}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", needless], text=True).strip() == "set()"


def test_a_release_does_not_need_the_dataset_which_a_newer_one_replaces(tmp_path: Path) -> None:
    config = write_endpoint(tmp_path)
    items = Dataset.open(Workspace.open(str(tmp_path))).items()
    shutil.rmtree(tmp_path / "dataset")
    release = Release.plan(config)
    assert release.items().equals(items)
    (file,) = (tmp_path / "memory" / "items").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{file}: damaged .*; run jobs/build_memory.py again"):
        release.items()
    file.unlink()
    with pytest.raises(InputError, match=rf"{file}: missing; run jobs/build_memory.py again"):
        Release.plan(config)


def test_it_follows_the_file(file: ReleaseFile) -> None:
    async def scenario() -> None:
        held = Held(file, load)
        assert (held.versions(), held.current()) == ([FIRST.version], "first")
        file.write([FIRST, SECOND])
        assert await held.get(SECOND.version) == "second"  # asked for before it was told
        file.write([SECOND, FIRST])
        assert await held.refresh() == [SECOND.version, FIRST.version]
        assert (held.current(), await held.get(FIRST.version)) == ("second", "first")
        file.write([SECOND])
        assert await held.refresh() == [SECOND.version]
        with pytest.raises(VersionError):
            await held.get(FIRST.version)

    asyncio.run(scenario())


def test_releases_of_one_origin_share_a_part(file: ReleaseFile) -> None:
    async def scenario() -> None:
        file.write([FIRST, SECOND])
        held = Held(file, lambda release: [release.index], lambda release: release.index == "damaged")
        assert await held.get(FIRST.version) is await held.get(SECOND.version)
        file.write([SECOND, DAMAGED])
        await held.refresh()
        assert (await held.get(SECOND.version), await held.get(DAMAGED.version)) == (["first"], ["damaged"])

    asyncio.run(scenario())


def test_a_damaged_release_beside_the_served_one_is_told_but_stops_nothing(file: ReleaseFile) -> None:
    """A promotion of it may have been killed, and replicas that die afterwards must be replaced."""

    async def scenario() -> None:
        file.write([FIRST, DAMAGED])
        held = Held(file, load)
        assert held.versions() == [FIRST.version]
        with pytest.raises(InputError, match="damaged"):
            await held.refresh()
        file.write([SECOND, DAMAGED, FIRST])
        await held.refresh_quietly()
        assert held.versions() == [SECOND.version, FIRST.version]

    asyncio.run(scenario())
    file.write([DAMAGED, FIRST])
    with pytest.raises(InputError, match="damaged"):
        Held(file, load)


def test_another_release_that_finds_no_memory_stops_nothing(file: ReleaseFile) -> None:
    def load_what_fits(release: Release) -> str:
        if release == SECOND:
            raise MemoryError
        return release.index

    async def scenario() -> None:
        file.write([FIRST, SECOND])
        held = Held(file, load_what_fits)
        await held.refresh_quietly()
        assert (held.versions(), held.current()) == ([FIRST.version], "first")
        with pytest.raises(MemoryError):
            await held.refresh()

    asyncio.run(scenario())


def test_who_asks_and_leaves_has_nothing_loaded_twice(file: ReleaseFile) -> None:
    loads: list[str] = []

    def load_slowly(release: Release) -> str:
        loads.append(release.index)
        time.sleep(0.2)
        return release.index

    async def scenario() -> None:
        held = Held(file, load_slowly)
        file.write([FIRST, SECOND])
        asking = asyncio.create_task(held.get(SECOND.version))
        await asyncio.sleep(0.1)
        asking.cancel()
        assert await held.refresh() == [FIRST.version, SECOND.version]
        assert loads == ["first", "second"]

    asyncio.run(scenario())


def test_what_is_named_while_the_first_is_loading_is_held_at_the_start(file: ReleaseFile) -> None:
    def load_slowly(release: Release) -> str:
        file.write([FIRST, SECOND])
        return release.index

    assert Held(file, load_slowly).versions() == [FIRST.version, SECOND.version]


def agree(
    encoder: tuple[str, ...], *shards: tuple[str, ...], starting: float = 0, partial: bool = False, away: int = 0
) -> None:
    """Wait for what holds these versions, once it has started, to hold "v"; nothing holds beams.

    So many more shards never start.
    """

    def part(versions: tuple[str, ...]) -> SimpleNamespace:
        async def remote() -> tuple[str, ...]:
            await asyncio.sleep(starting)
            return versions

        return SimpleNamespace(versions=SimpleNamespace(remote=remote))

    asked = Replicas.__new__(Replicas)
    asked.encoder, asked.shards, asked.beams = part(encoder), [*map(part, shards)], part(())  # type: ignore[assignment,list-item]
    asked.shards += [SimpleNamespace(versions=SimpleNamespace(remote=asyncio.Event().wait))] * away  # type: ignore[list-item]
    asked.settings = ServeConfig(partial=partial)
    asyncio.run(asyncio.wait_for(asked.agree("v"), 5))


def test_a_gateway_does_not_wait_for_beams() -> None:
    agree(("v",), ("u", "v"))


def test_a_gateway_waits_for_parts_that_take_long_to_start_but_not_for_those_of_another_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "START_SECONDS", 0.1)
    agree(("v",), ("v",), starting=0.3)
    with pytest.raises(InputError, match=r"^MemoryShard-1: of another release than v$"):
        agree(("v",), ("v",), ("u",))


def test_a_gateway_starts_without_a_shard_only_where_an_answer_may_be_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "START_SECONDS", 0.1)
    agree(("v",), ("v",), partial=True, away=1)
    for partial, shards in ((False, (("v",),)), (True, ())):  # never without any shard
        with pytest.raises(TimeoutError):
            agree(("v",), *shards, partial=partial, away=1)
    with pytest.raises(InputError, match=r"^MemoryShard-0: of another release than v$"):
        agree(("v",), ("u",), ("v",), partial=True, away=1)


@pytest.mark.parametrize(
    ("seconds", "failure", "outcome"),
    [
        (0.0, asyncio.CancelledError, "cancelled"),
        (0.1, asyncio.CancelledError, "late"),
        (0.1, OverloadedError, "overloaded"),
        (0.0, ValueError, "failed"),
    ],
)
def test_a_request_that_is_cancelled_is_late_only_at_its_deadline(
    seconds: float, failure: type[BaseException], outcome: str
) -> None:
    counted: list[str] = []
    asked = Replicas.__new__(Replicas)
    asked.settings = ServeConfig(deadline_seconds=0.1)
    asked._outcomes = SimpleNamespace(inc=lambda tags: counted.append(tags["outcome"]))

    def ask() -> None:
        with asked.counted("v", "recommend"):
            time.sleep(seconds)
            raise failure

    with pytest.raises(failure):
        ask()
    assert counted == [outcome]


def search(engine: LocalEngine, away: set[int], partial: bool) -> tuple[ScoredItems, list[int]]:
    """What a gateway finds where some parts of the index, each of one shard, do not answer."""
    shards = engine.index.shards
    query = Query([1, 2, 3], 10, "local", 200, np.array([1, 2, 3]))
    queries_UD = engine.index.space(engine.encoder.encode([query.history]).states_UD)

    async def ask_part(number: int, method: str, version: str, *question: Any) -> Any:
        if number in away:
            raise TimeoutError
        if method == "recommend":
            return run(hops_of(question[0], 1, question[1]), [shards[number]])
        return answers([shards[number]], *question)

    asked = Replicas.__new__(Replicas)
    asked.shards, asked.settings = [None] * len(shards), ServeConfig(partial=partial)  # type: ignore[list-item]
    asked._ask_part = ask_part  # type: ignore[method-assign]
    return asyncio.run(asked.search("v", len(shards), query, queries_UD))


def test_without_a_shard_there_is_a_part_of_the_answer_only_where_the_operator_allows_it(engine: LocalEngine) -> None:
    whole, missing = search(engine, set(), partial=False)
    assert missing == []
    with pytest.raises(UnavailableError, match=r"shards \[0\] of the index are away; come again later"):
        search(engine, {0}, partial=False)
    part, missing = search(engine, {0}, partial=True)
    assert missing == [0]
    assert part.items_I.tolist() != whole.items_I.tolist()
    assert not np.isin(part.items_I, engine.index.shards[0].items_I).any()
    with pytest.raises(UnavailableError):
        search(engine, set(range(len(engine.index.shards))), partial=True)


@pytest.mark.parametrize("kind", [Encoder, BeamSearcher])
def test_a_replica_whose_model_hangs_is_unhealthy(
    file: ReleaseFile, monkeypatch: pytest.MonkeyPatch, kind: type[Encoder] | type[BeamSearcher]
) -> None:
    monkeypatch.setattr(models, "WEDGED_SECONDS", 0.1)
    monkeypatch.setattr(Encoder, "_observe", lambda *_: None)  # metrics need Ray
    gate = threading.Event()

    def run(items: list[int]) -> list[int]:
        gate.wait(10)
        return items

    async def scenario() -> None:
        batcher = TokenBatcher(run, abs, 10)
        replica = kind.__new__(kind)
        replica.held = Held(file, lambda _: SimpleNamespace(batcher=batcher))
        vars(replica).update(_run=batcher, _longest=0.1)  # a beam searcher's
        waiting = asyncio.create_task(batcher(1))
        await asyncio.sleep(0)
        await replica.check_health()
        await asyncio.sleep(0.2)
        with pytest.raises(RuntimeError, match="one batch for more than"):
            await replica.check_health()
        gate.set()
        await waiting
        await replica.check_health()

    asyncio.run(scenario())


def test_a_replica_whose_batches_all_fail_is_unhealthy(file: ReleaseFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "_observe", lambda *_: None)  # metrics need Ray

    def run(items: list[int]) -> list[int]:
        if 0 in items:
            raise ValueError
        return items

    async def scenario() -> None:
        batcher = TokenBatcher(run, abs, 10)
        replica = Encoder.__new__(Encoder)
        replica.held = Held(file, lambda _: SimpleNamespace(batcher=batcher))
        for item in [0] * 4 + [1] + [0] * 4:
            await asyncio.gather(batcher(item), return_exceptions=True)
            await replica.check_health()  # one that fails now and then may be what was asked
        await asyncio.gather(batcher(0), return_exceptions=True)
        with pytest.raises(RuntimeError, match="the last 5 batches failed"):
            await replica.check_health()

    asyncio.run(scenario())
