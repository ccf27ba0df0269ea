"""Both layouts of the endpoint, without Ray: the same requests, limits, failures and promotions."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from support.local_gateways import LAYOUTS, release_file, serving
from support.served_items import check_answer, check_items
from support.small_endpoint import LocalEngine, grow_endpoint, write_endpoint
from support.small_workspace import ITEM_COUNT

from l2d_ray.command_line import load_config
from l2d_ray.core.query import Query
from l2d_ray.distributed.serving.deployments import is_colocated, new_release_file
from l2d_ray.distributed.serving.encoders import BROKEN_BATCHES, Encoder
from l2d_ray.distributed.serving.gateway import Gateway
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.errors import InputError
from l2d_ray.serve.releases import ReleaseFile

PATH = "/v1/recommend"
HISTORIES = [[number, 3, (7 * number) % 30] for number in range(8)]
Scenario = Callable[[AsyncClient, Gateway, Encoder], Coroutine[Any, Any, None]]


def body(history: list[int], **fields: Any) -> dict[str, Any]:
    return {"history": [f"i{item}" for item in history], "k": 10, **fields}


def run(layout: str, file: ReleaseFile, scenario: Scenario) -> None:
    """Run a scenario with a gateway that serves the release of a file."""

    async def served() -> None:
        async with serving(layout, file) as parts:
            await scenario(*parts)

    asyncio.run(served())


class Gate:
    """A gate before the model: closed, a batch waits there."""

    def __init__(self) -> None:
        self.open, self.arrived = threading.Event(), threading.Event()
        self.failure: Exception | None = None

    async def wait_for_batch(self) -> None:
        assert await asyncio.to_thread(self.arrived.wait, 10)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Put a gate before every model."""
    gate, model = Gate(), HistoryEncoder.run

    def held(self: HistoryEncoder, histories: Any) -> Any:
        gate.arrived.set()
        gate.open.wait(10)
        if gate.failure:
            raise gate.failure
        return model(self, histories)

    monkeypatch.setattr(HistoryEncoder, "run", held)
    yield gate
    gate.open.set()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parallel_requests_each_get_the_right_answer(layout: str, engine: LocalEngine) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        asked = [(history, name) for history in HISTORIES for name in ("local", "global", "posterior")]
        posts = (http.post(PATH, json=body(history, aggregation=name)) for history, name in asked)
        for (history, name), response in zip(asked, await asyncio.gather(*posts), strict=True):
            assert response.status_code == 200, response.text
            assert not response.json()["partial"]
            check_answer(engine, response.json(), history, name)
        status = (await http.get("/v1/status")).json()
        assert (status["items"], status["rows"], status["shards"]) == (30, 360, 2)

    run(layout, release_file(engine.config), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_titles_filters_batches_and_explanations_reach_the_client(layout: str, engine: LocalEngine) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        titled = {"history": ["i3", {"title": "A film of tomorrow"}], "k": 5}
        batch = await http.post(f"{PATH}/batch", json={"requests": [titled, body([3, 7])]})
        first, second = batch.json()["responses"]
        check_answer(engine, first, [3, "A film of tomorrow"], k=5)
        check_answer(engine, second, [3, 7])
        filtered = await http.post(PATH, json=body([3], allow=["i1", "i2", "i3"], deny=["i2"], exclude_seen=False))
        assert {item["item_id"] for item in filtered.json()["items"]} == {"i1", "i3"}
        answer = (await http.post(PATH, json=body([3, 7], aggregation="posterior", explain=True))).json()
        query = Query.after([3, 7], 10, aggregation="posterior")
        for item, expected in zip(answer["items"], engine.explain(query, engine.answer(query)), strict=True):
            assert expected is not None
            assert item["explanation"]["sequences"] == expected.sequences
            assert item["explanation"]["terms"] == pytest.approx(expected.terms, abs=2e-3)

    run(layout, release_file(engine.config), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_requests_beyond_a_limit_are_refused_with_their_id(layout: str, engine: LocalEngine) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        for path, content, status, detail in (
            (PATH, {"history": ["nope"]}, 422, "body.history: "),
            (PATH, body([3, 4, 5]), 422, "body.history: 3 items, at most 2 are allowed (serve.max_history)"),
            (PATH, body([3], k=41), 422, "body.k: 41 items, at most 40 are allowed (serve.max_k)"),
            (f"{PATH}/batch", {"requests": [body([3])] * 3}, 422, "body.requests: 3 requests, at most 2 "),
            (PATH, body([3], allow=["i1"] * 3), 422, "body.allow: 3 items, at most 2 "),
            (PATH, body([3], recommender="sasrec"), 422, "body.recommender: not served; give one of l2d "),
            (PATH, {"history": [{"title": "x" * 5000}]}, 413, "the body is larger than 4000 bytes"),
            ("/v1/beam_search", body([3]), 404, "Not Found"),
        ):
            response = await http.post(path, json=content, headers={"X-Request-ID": "mine"})
            assert (response.status_code, response.headers["x-request-id"]) == (status, "mine")
            assert response.json()["detail"].startswith(detail)

    limits = {"max_history": 2, "max_k": 40, "max_batch": 2, "max_filter_items": 2, "max_body_bytes": 4000}
    run(layout, release_file(engine.config, **limits), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recommender_next_to_l2d_answers(layout: str, engine: LocalEngine) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        engine.offer("transitions")
        for history in HISTORIES:
            response = await http.post(PATH, json=body(history, recommender="transitions"))
            (expected,) = engine.others["transitions"].recommend([Query.after(history, 10)])
            check_items(response.json(), expected)
        assert encoder.counts() == {}

    run(layout, release_file(engine.config, recommender=["transitions"]), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_new_items_of_a_returning_user_run(layout: str, engine: LocalEngine) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        history = [*range(9)]
        first = (await http.post(PATH, json=body(history[:-1]))).json()
        tokens = encoder.counts()["tokens"]
        again = (await http.post(PATH, json=body(history))).json()
        check_answer(engine, first, history[:-1])
        check_answer(engine, again, history)
        assert encoder.counts()["hits"] == 1
        assert encoder.counts()["tokens"] - tokens < tokens / 4

    run(layout, release_file(engine.config), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_event_loop_answers_while_the_model_runs(layout: str, engine: LocalEngine, gate: Gate) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        waiting = asyncio.create_task(http.post(PATH, json=body([3])))
        await gate.wait_for_batch()
        for path in ("/healthz", "/v1/status", "/v1/items?query=title"):
            assert (await http.get(path)).status_code == 200
        await gateway.check_health()
        gate.open.set()
        check_answer(engine, (await waiting).json(), [3])

    run(layout, release_file(engine.config), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_silent_model_is_away_and_clients_that_left_cost_nothing(
    layout: str, engine: LocalEngine, gate: Gate
) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        late = asyncio.create_task(http.post(PATH, json=body([3])))
        await gate.wait_for_batch()
        left = asyncio.create_task(http.post(PATH, json=body([4, 5])))
        await asyncio.sleep(0.05)
        left.cancel()
        refused = await late
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["detail"] == "the model is unavailable; try again later"
        gate.open.set()
        while not encoder.counts():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert encoder.counts()["requests"] == 1

    run(layout, release_file(engine.config, deadline_seconds=0.5), scenario)


def test_more_requests_than_may_wait_are_refused(engine: LocalEngine, gate: Gate) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        posts = [asyncio.create_task(http.post(PATH, json=body([item]))) for item in range(10)]
        await gate.wait_for_batch()
        while sum(post.done() for post in posts) < 6:
            await asyncio.sleep(0.01)
        gate.open.set()
        responses: list[Response] = await asyncio.gather(*posts)
        assert sorted(response.status_code for response in responses) == [200] * 4 + [503] * 6
        for refused in responses[4:]:
            assert refused.headers["Retry-After"] == "1"
            assert refused.json()["detail"] == "too many requests are waiting for the model; try again later"

    run("colocated", release_file(engine.config, max_waiting=4, max_batch=4), scenario)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gateway_whose_model_is_broken_is_unhealthy_where_it_holds_one(
    layout: str, engine: LocalEngine, gate: Gate
) -> None:
    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        for _ in range(BROKEN_BATCHES):
            await gateway.check_health()
            with pytest.raises(ValueError, match="broken"):  # Starlette raises it again after its answer, 500
                await http.post(PATH, json=body([3]))
        with pytest.raises(RuntimeError, match=f"the last {BROKEN_BATCHES} batches failed"):
            await (gateway if layout == "colocated" else encoder).check_health()

    gate.failure = ValueError("broken")
    gate.open.set()
    run(layout, release_file(engine.config), scenario)


def test_a_promotion_loads_turns_and_drops_while_requests_are_answered(tmp_path: Path) -> None:
    config = write_endpoint(tmp_path)
    file, old_engine = release_file(config), LocalEngine(config)
    grow_endpoint(config)
    new_engine, newer = LocalEngine(config), new_release_file(config).first
    old, new, query = file.first.version, newer.version, body([1, 2])

    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        async def answered() -> str:
            answer = (await http.post(PATH, json=query)).json()
            check_answer(old_engine if answer["version"] == old else new_engine, answer, [1, 2])
            return str(answer["version"])

        file.write([file.first, newer])
        refresh, seen = asyncio.create_task(gateway.refresh()), set[str]()
        while not refresh.done():
            seen.add(await answered())
        assert (await refresh, seen) == ([old, new], {old})
        file.write([newer, file.first])
        assert await gateway.versions() == [new, old]
        assert await answered() == new
        fresh = (await http.post(PATH, json=body([1, ITEM_COUNT]))).json()
        check_answer(new_engine, fresh, [1, ITEM_COUNT])
        file.write([newer])
        assert await gateway.refresh() == [new]
        assert len(encoder.cache.contents()) == 1
        assert await answered() == new

    run("colocated", file, scenario)


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_served(engine: LocalEngine, tmp_path: Path) -> None:
    newer = new_release_file(write_endpoint(tmp_path, seed=2)).first
    (rows, *_) = tmp_path.glob("index/**/rows.faiss")
    rows.write_bytes(rows.read_bytes()[:-1])
    file = release_file(engine.config)

    async def scenario(http: AsyncClient, gateway: Gateway, encoder: Encoder) -> None:
        file.write([file.first, newer])
        with pytest.raises(InputError, match=rows.name):
            await gateway.refresh()
        answer = (await http.post(PATH, json=body([1, 2]))).json()
        assert answer["version"] == file.first.version
        check_answer(engine, answer, [1, 2])

    run("colocated", file, scenario)


def test_the_layout_follows_from_the_size_of_the_index_and_the_replicas(engine: LocalEngine) -> None:
    manifest = release_file(engine.config).first.open().manifest

    def colocated(**settings: Any) -> bool:
        return is_colocated(
            engine.config.replace({key.replace("__", "."): one for key, one in settings.items()}), manifest
        )

    megabytes = manifest.rows * manifest.bytes_per_row / 1e6
    assert colocated()
    assert colocated(serve__shard_megabytes=1.01 * megabytes, serve__beams=4, serve__recommender=["transitions"])
    for apart in (
        {"serve__shard_megabytes": 0.99 * megabytes},
        {"serve__gateways": 2},
        {"serve__encoders": 2},
        {"serve__shard_replicas": 2},
        {"workers__gpus": 1.0},
        {"serve__layout": "distributed"},
    ):
        assert not colocated(**apart), apart
    assert colocated(serve__layout="colocated", serve__shard_megabytes=0.001, serve__encoders=2, serve__gateways=2)


@pytest.mark.parametrize("setting", ["gateways", "shard_replicas"])
def test_parts_of_a_co_located_replica_are_not_replicated_alone(setting: str) -> None:
    line = r"serve.layout=colocated: .*; set serve.encoders=3, or serve.layout=distributed"
    with pytest.raises(InputError, match=line):
        load_config(["serve.layout=colocated", f"serve.{setting}=3"])
