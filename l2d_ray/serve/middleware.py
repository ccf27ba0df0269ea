"""ASGI middleware of the application: request ids, and limits on the size and the arrival of a body."""

import asyncio
import re
import uuid

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2d_ray.serve.problems import problem

REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""Request ids that are accepted from a client."""


def request_id_of(scope: Scope) -> str:
    """Return the client's X-Request-ID if it is well-formed, else a new id."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def with_headers(send: Send, headers: dict[bytes, bytes]) -> Send:
    """Return a `send` that sets these response headers, replacing those of the same name."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", []) if pair[0] not in headers]
            message = {**message, "headers": [*kept, *headers.items()]}
        await send(message)

    return send_with_headers


class RequestLimits:
    """ASGI middleware: give each request an id, answer 413 to a large body and 408 to a body that does not arrive."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_seconds: float) -> None:
        """Pass at most `max_body_bytes` of a body on to `app`; the body has `body_seconds` to arrive."""
        self._app, self._max_body_bytes, self._body_seconds = app, max_body_bytes, body_seconds
        self._too_large = f"the body is larger than {max_body_bytes} bytes (serve.max_body_bytes)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        send = with_headers(send, {b"x-request-id": request_id.encode(), b"x-content-type-options": b"nosniff"})
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body_bytes:
            await problem(Request(scope), 413, self._too_large)(scope, receive, send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that raises HTTPException when the body exceeds a limit."""
        size, more = 0, True
        deadline = asyncio.get_running_loop().time() + self._body_seconds

        async def receive_within_limits() -> Message:
            nonlocal size, more
            try:
                # Once the body is complete, the only message left is the client's disconnect: it has no deadline.
                async with asyncio.timeout_at(deadline if more else None):
                    message = await receive()
            except TimeoutError:
                late = "the body did not arrive in time (serve.deadline_seconds)"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > self._max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return receive_within_limits
