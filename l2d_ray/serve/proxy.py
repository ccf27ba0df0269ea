"""Around Ray Serve's own proxy: a request whose gateway dies is put to another one.

Ray's proxy answers it with a bare 500, for it cannot know whether a request may run twice. Those of this endpoint may:
they only read. Ray takes `middlewares` in by an environment variable of the nodes:
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=l2d_ray.serve.proxy:middlewares, which a job sets for the Ray that it starts.
"""

import sys

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2d_ray.serve.api import Envelope, problem

POSTS = ("/v1/recommend", "/v1/recommend/batch", "/v1/beam_search")
"""What may run twice besides GET: the same Ray Serve may have other applications."""
ATTEMPTS = 2
"""No more, lest a request that kills gateways kills them all."""


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its proxy."""
    return [Middleware(Again)]


class Again:
    """Asks again where there was no answer, and answers 503 where there is none then."""

    def __init__(self, app: ASGIApp) -> None:
        """`app` returns without a message if the replica that it asked died."""
        self._app = app
        self._unavailable = Envelope(_unavailable, max_body_bytes=sys.maxsize, body_seconds=0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keeps what it receives (which the proxy does as well) until the answer begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received: list[Message] = []
        answered = False

        async def kept() -> Message:
            message = await receive()
            received.append(message)
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        again = scope["method"] in ("GET", "HEAD") or scope["path"] in POSTS
        for _ in range(ATTEMPTS if again else 1):
            await self._app(dict(scope), _replayed(received, kept), noted)
            if answered or any(message["type"] == "http.disconnect" for message in received):
                return
        await self._unavailable(scope, receive, send)


def _replayed(received: list[Message], then: Receive) -> Receive:
    """What was received before, then the rest."""
    before = iter(list(received))

    async def receive() -> Message:
        message = next(before, None)
        return await then() if message is None else message

    return receive


async def _unavailable(scope: Scope, receive: Receive, send: Send) -> None:
    response = problem(Request(scope), 503, "the gateway is away; come again later", headers={"Retry-After": "1"})
    await response(scope, receive, send)
