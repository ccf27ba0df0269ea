"""ASGI middleware of Ray Serve's HTTP servers: strip Ray's control headers, retry requests, answer errors in JSON.

It wraps two servers. One is the server of a gateway, behind HAProxy. The other is Ray's own proxy: HAProxy's fallback
while no gateway is available, and the only way in without HAProxy. Ray's proxy answers a bare 500 when the gateway of
a request dies, because it cannot know whether the request may run twice. The requests of this endpoint may, since they
only read. So the middleware sends them to another gateway, as HAProxy does. Ray Serve imports `middlewares` by an
environment variable (`distributed/serving/haproxy.py`).
"""

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2d_ray.serve.middleware import request_id_of, with_headers
from l2d_ray.serve.problems import problem

RETRIED_POSTS = ("/v1/recommend", "/v1/recommend/batch", "/v1/beam_search")
"""Paths whose POST may run twice. The list is explicit: the same Ray Serve may run other applications."""
ATTEMPTS = 2
"""Attempts at a request. No more, because a request that kills gateways must not kill them all: HAProxy retries too."""
CONTROL_HEADERS = {
    b"x-request-id",
    b"x-session-id",
    b"serve-multiplexed-model-id",
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
}
"""Headers by which Ray lets a client choose the replica, the timeout and the cancellation.

Ray fails on values that are not UTF-8, and accepts some of the names with underscores, too.
"""


def middlewares() -> list[Middleware]:
    """Return the middleware that Ray Serve puts around its HTTP servers."""
    return [Middleware(RetryMiddleware)]


class RetryMiddleware:
    """ASGI middleware: retry a request that got no answer, then answer 503.

    Of the control headers, only a well-formed request id is passed on; the response carries it once.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`, which returns without a message if the replica that it called died."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Keeps its body, as Ray's proxy does, until the response begins."""
        request_id = request_id_of(scope)
        id_header = {b"x-request-id": request_id.encode()}
        kept = [pair for pair in scope["headers"] if pair[0].replace(b"_", b"-") not in CONTROL_HEADERS]
        scope, send = {**scope, "headers": [*kept, *id_header.items()]}, with_headers(send, id_header)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not scope["path"].startswith("/"):  # OPTIONS *, which Ray routes to no application
            await problem(_with_id(scope, request_id), 404, "Not Found")(scope, receive, send)
        elif not await self._attempt(scope, receive, send):
            away = "the gateway is unavailable, or too many requests are waiting for it; try again later"
            refusal = problem(_with_id(scope, request_id), 503, away, headers={"Retry-After": "1"})
            await refusal(scope, receive, send)

    async def _attempt(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Run the request until it is answered. Returns False if every attempt failed.

        True also if the client has disconnected.
        """
        received: list[Message] = []
        answered = False

        async def record() -> Message:
            message = await receive()
            if not answered:
                received.append(message)
            return message

        async def forward(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = not (scope["path"].startswith("/v1/") and _is_backpressure(message))
            if answered:
                received.clear()
                await send(message)

        retried = scope["method"] in ("GET", "HEAD") or scope["path"] in RETRIED_POSTS
        for _ in range(ATTEMPTS if retried else 1):
            await self._app(dict(scope), _replay(received, record), forward)
            if answered or any(message["type"] == "http.disconnect" for message in received):
                return True
        return False


def _with_id(scope: Scope, request_id: str) -> Request:
    """Return the request, with its id where `problem` reads it."""
    return Request({**scope, "state": {"request_id": request_id}})


def _is_backpressure(start: Message) -> bool:
    """Return whether Ray's proxy refused the request for lack of a free gateway.

    Ray's proxy refuses in plain text; the gateways answer in JSON.
    """
    content_type: bytes = dict(start["headers"]).get(b"content-type", b"")
    return start["status"] == 503 and content_type.startswith(b"text/plain")


def _replay(received: list[Message], then: Receive) -> Receive:
    """Return a `receive` that repeats the messages received before, then continues with `then`."""
    before = iter(list(received))

    async def receive() -> Message:
        message = next(before, None)
        return await then() if message is None else message

    return receive
