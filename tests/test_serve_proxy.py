"""What stands around Ray Serve's proxy, with a stand-in for the proxy that loses requests."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from support.hostile_requests import STEERING

from l2d_ray.serve.api import REQUEST_ID
from l2d_ray.serve.proxy import Again, middlewares


class Proxy:
    """Echoes the body; loses the first so many requests, each after it read so much of the body."""

    def __init__(self, losses: int, reads: int = 2) -> None:
        self.losses, self.reads, self.asked = losses, reads, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if self.asked <= self.losses:
            for _ in range(self.reads):
                await receive()
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [[b"x-request-id", b"of Ray"]] * 2})
        await send({"type": "http.response.body", "body": body})


async def full(scope: Scope, receive: Receive, send: Send) -> None:
    """Ray's proxy where too many requests wait for a gateway."""
    headers = [[b"content-type", b"text/plain; charset=utf-8"]]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"Request dropped due to backpressure"})


def ask(app: ASGIApp, method: str = "POST", path: str = "/v1/recommend", leave: bool = False) -> list[Message]:
    """The messages of the answer to a request whose body comes in two parts; who leaves does so behind the first."""
    rest: Message = {"type": "http.request", "body": b" away", "more_body": False}
    messages = iter(
        [{"type": "http.request", "body": b"far", "more_body": True}, {"type": "http.disconnect"} if leave else rest]
    )
    answer: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        answer.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": [(b"x-request-id", b"mine")]}
    asyncio.run(Again(app)(scope, receive, send))
    return answer


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_lost_request_is_asked_again_with_its_whole_body(reads: int) -> None:
    start, body = ask(Proxy(losses=1, reads=reads))
    assert body["body"] == b"far away"
    assert start["headers"] == [(b"x-request-id", b"mine")]


def test_a_request_that_is_lost_again_is_a_documented_503() -> None:
    proxy = Proxy(losses=9)
    start, body = ask(proxy)
    headers = dict(start["headers"])
    assert (proxy.asked, start["status"], headers[b"retry-after"], headers[b"x-request-id"]) == (2, 503, b"1", b"mine")
    assert json.loads(body["body"]) == {
        "detail": "the gateway is away, or too many requests wait for it; come again later",
        "request_id": "mine",
        "errors": [],
    }
    assert ask(full) == [start, body]


def test_a_request_to_no_path_is_answered_as_others_are() -> None:
    proxy = Proxy(losses=0)
    start, body = ask(proxy, method="OPTIONS", path="*")
    assert (proxy.asked, start["status"], dict(start["headers"])[b"x-request-id"]) == (0, 404, b"mine")
    assert json.loads(body["body"]) == {"detail": "Not Found", "request_id": "mine", "errors": []}


def test_other_applications_have_their_own_words() -> None:
    assert [message["type"] for message in ask(full, path="/pay")] == ["http.response.start", "http.response.body"]
    assert ask(full, path="/pay")[1]["body"] == b"Request dropped due to backpressure"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("line", STEERING)
def test_what_steers_ray_does_not_reach_it(kind: str, line: bytes) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request"}

    lines = [line.split(b": ") for line in line.split(b"\r\n")]
    headers = [(b"authorization", b"\xff"), *((name.lower(), value) for name, value in lines)]
    scope = {"type": kind, "method": "GET", "path": "/healthz", "headers": headers}
    asyncio.run(Again(app)(scope, nothing, nothing))
    kept, (name, value) = seen[0]["headers"]
    assert (kept, name) == (headers[0], b"x-request-id")
    assert REQUEST_ID.fullmatch(value.decode())


def test_what_might_not_run_twice_and_who_has_left_are_not_asked_again() -> None:
    other, left = Proxy(losses=1), Proxy(losses=1)
    assert ask(other, path="/pay")[0]["status"] == 503
    assert ask(left, leave=True) == []
    assert (other.asked, left.asked) == (1, 1)
    assert ask(Proxy(losses=1), method="GET", path="/v1/items")[0]["status"] == 200


def test_ray_serve_takes_it_in() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert [one.cls for one in validate_http_proxy_callback_return(middlewares())] == [Again]
