"""What stands around Ray Serve's proxy, with a stand-in for the proxy that loses requests."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

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
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(proxy: Proxy, method: str = "POST", path: str = "/v1/recommend", leave: bool = False) -> list[Message]:
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
    asyncio.run(Again(proxy)(scope, receive, send))
    return answer


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_lost_request_is_asked_again_with_its_whole_body(reads: int) -> None:
    _, body = ask(Proxy(losses=1, reads=reads))
    assert body["body"] == b"far away"


def test_a_request_that_is_lost_again_is_a_documented_503() -> None:
    proxy = Proxy(losses=9)
    start, body = ask(proxy)
    headers = dict(start["headers"])
    assert (proxy.asked, start["status"], headers[b"retry-after"], headers[b"x-request-id"]) == (2, 503, b"1", b"mine")
    assert json.loads(body["body"]) == {
        "detail": "the gateway is away; come again later",
        "request_id": "mine",
        "errors": [],
    }


def test_what_might_not_run_twice_and_who_has_left_are_not_asked_again() -> None:
    other, left = Proxy(losses=1), Proxy(losses=1)
    assert ask(other, path="/pay")[0]["status"] == 503
    assert ask(left, leave=True) == []
    assert (other.asked, left.asked) == (1, 1)
    assert ask(Proxy(losses=1), method="GET", path="/v1/items")[0]["status"] == 200


def test_ray_serve_takes_it_in() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert [one.cls for one in validate_http_proxy_callback_return(middlewares())] == [Again]
