"""The middleware around Ray Serve's HTTP servers, with a stand-in for a server that loses requests."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from support.hostile_inputs import CONTROL_HEADERS

from l2d_ray.serve.middleware import REQUEST_ID
from l2d_ray.serve.proxy import RetryMiddleware, middlewares


class Proxy:
    """A server that echoes bodies. It loses its first requests, each after it has read some messages of the body."""

    def __init__(self, losses: int, reads: int = 2) -> None:
        self.losses, self.reads, self.requests = losses, reads, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        if self.requests <= self.losses:
            for _ in range(self.reads):
                await receive()
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [[b"x-request-id", b"of Ray"]] * 2})
        await send({"type": "http.response.body", "body": body})


async def overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer like Ray's proxy when too many requests are waiting for a gateway."""
    headers = [[b"content-type", b"text/plain; charset=utf-8"]]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"Request dropped due to backpressure"})


def request(app: ASGIApp, method: str = "POST", path: str = "/v1/recommend", leave: bool = False) -> list[Message]:
    """Return the messages of the response to a request whose body comes in two parts. `leave`: after the first one."""
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
    asyncio.run(RetryMiddleware(app)(scope, receive, send))
    return answer


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_lost_request_is_retried_with_its_whole_body(reads: int) -> None:
    start, body = request(Proxy(losses=1, reads=reads))
    assert body["body"] == b"far away"
    assert start["headers"] == [(b"x-request-id", b"mine")]


def test_a_request_that_is_lost_twice_gets_a_documented_503() -> None:
    proxy = Proxy(losses=9)
    start, body = request(proxy)
    headers = dict(start["headers"])
    assert (proxy.requests, start["status"], headers[b"retry-after"], headers[b"x-request-id"]) == (
        2,
        503,
        b"1",
        b"mine",
    )
    assert json.loads(body["body"]) == {
        "detail": "the gateway is unavailable, or too many requests are waiting for it; try again later",
        "request_id": "mine",
        "errors": [],
    }
    assert request(overloaded) == [start, body]


def test_a_request_without_a_path_gets_a_documented_404() -> None:
    proxy = Proxy(losses=0)
    start, body = request(proxy, method="OPTIONS", path="*")
    assert (proxy.requests, start["status"], dict(start["headers"])[b"x-request-id"]) == (0, 404, b"mine")
    assert json.loads(body["body"]) == {"detail": "Not Found", "request_id": "mine", "errors": []}


def test_responses_of_other_applications_are_passed_on() -> None:
    start, body = request(overloaded, path="/pay")
    assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
    assert body["body"] == b"Request dropped due to backpressure"


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("line", CONTROL_HEADERS)
def test_control_headers_do_not_reach_ray(kind: str, line: bytes) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request"}

    lines = [line.split(b": ") for line in line.split(b"\r\n")]
    headers = [(b"authorization", b"\xff"), *((name.lower(), value) for name, value in lines)]
    scope = {"type": kind, "method": "GET", "path": "/healthz", "headers": headers}
    asyncio.run(RetryMiddleware(app)(scope, nothing, nothing))
    kept, (name, value) = seen[0]["headers"]
    assert (kept, name) == (headers[0], b"x-request-id")
    assert REQUEST_ID.fullmatch(value.decode())


def test_requests_of_other_applications_and_of_clients_that_left_are_not_retried() -> None:
    other, left = Proxy(losses=1), Proxy(losses=1)
    assert request(other, path="/pay")[0]["status"] == 503
    assert request(left, leave=True) == []
    assert (other.requests, left.requests) == (1, 1)
    assert request(Proxy(losses=1), method="GET", path="/v1/items")[0]["status"] == 200


def test_ray_serve_accepts_the_middleware() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert [one.cls for one in validate_http_proxy_callback_return(middlewares())] == [RetryMiddleware]
