"""Around what Ray Serve listens with: no header steers it, and what it refuses is refused in words.

That is a gateway's own server, behind HAProxy, and Ray's proxy: HAProxy's last resort while there is no gateway, and
all that there is without HAProxy. That proxy answers a request whose gateway dies with a bare 500, for it cannot know
whether it may run twice. Those of this endpoint may: they only read. So it is put to another gateway here, as HAProxy
does. Ray takes `middlewares` in by a variable of its environment (`distributed/serving/haproxy.py`).
"""

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2d_ray.serve.api import problem, request_id_of, with_headers

POSTS = ("/v1/recommend", "/v1/recommend/batch", "/v1/beam_search")
"""What may run twice besides GET: the same Ray Serve may have other applications."""
ATTEMPTS = 2
"""No more, lest a request that kills gateways kills them all: HAProxy has tried before."""
STEERING = {
    b"x-request-id",
    b"x-session-id",
    b"serve-multiplexed-model-id",
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
}
"""Headers by which Ray lets a client choose replica, timeout and cancellation; bytes that are not UTF-8 make it fail.
It takes some with underscores, too."""


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around its HTTP servers."""
    return [Middleware(Again)]


class Again:
    """Asks again where there was no answer, and answers 503 where there is none then.

    Of the headers that steer Ray, only the request's id arrives there, a good one, and comes back once.
    """

    def __init__(self, app: ASGIApp) -> None:
        """`app` returns without a message if the replica that it asked died."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keeps what it receives (which the proxy does as well) until the answer begins."""
        request_id = request_id_of(scope)
        own = {b"x-request-id": request_id.encode()}
        kept = [pair for pair in scope["headers"] if pair[0].replace(b"_", b"-") not in STEERING]
        scope, send = {**scope, "headers": [*kept, *own.items()]}, with_headers(send, own)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not scope["path"].startswith("/"):  # OPTIONS *, which Ray takes to no application
            await problem(_numbered(scope, request_id), 404, "Not Found")(scope, receive, send)
            return
        received: list[Message] = []
        answered = False

        async def noting() -> Message:
            message = await receive()
            if not answered:
                received.append(message)
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = not (scope["path"].startswith("/v1/") and _refused(message))
            if answered:
                received.clear()
                await send(message)

        again = scope["method"] in ("GET", "HEAD") or scope["path"] in POSTS
        for _ in range(ATTEMPTS if again else 1):
            await self._app(dict(scope), _replayed(received, noting), noted)
            if answered or any(message["type"] == "http.disconnect" for message in received):
                return
        away = "the gateway is away, or too many requests wait for it; come again later"
        refusal = problem(_numbered(scope, request_id), 503, away, headers={"Retry-After": "1"})
        await refusal(scope, receive, send)


def _numbered(scope: Scope, request_id: str) -> Request:
    """The request as `problem` wants it."""
    return Request({**scope, "state": {"request_id": request_id}})


def _refused(start: Message) -> bool:
    """Whether Ray's proxy has no place for a request at any gateway: it says so in text, gateways answer in JSON."""
    kind: bytes = dict(start["headers"]).get(b"content-type", b"")
    return start["status"] == 503 and kind.startswith(b"text/plain")


def _replayed(received: list[Message], then: Receive) -> Receive:
    """What was received before, then the rest."""
    before = iter(list(received))

    async def receive() -> Message:
        message = next(before, None)
        return await then() if message is None else message

    return receive
