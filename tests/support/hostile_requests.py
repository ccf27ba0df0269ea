"""Random hostile HTTP requests from a seed, and checks of the replies."""

import http.client
import json
import os
import select
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from support.hostile_inputs import FIELDS, GARBAGE, HEADERS, METHODS, PATHS, TYPES, VALUES
from support.running_endpoint import ask

EXAMPLES = int(os.environ.get("L2D_RAY_HOSTILE_EXAMPLES", "20"))
"""Factor of the number of requests in each test."""
VALID = {"history": ["i3", "i7", "i11"], "k": 5}
COMPLETE, UNCERTAIN, INCOMPLETE = 20.0, 0.2, 0.0
"""Seconds of patience with a request that is complete, that may be complete, and that is not."""
LARGE = 1 << 20
"""Bytes of a request above which the server may close the connection before the client has read the reply."""


@dataclass(frozen=True)
class Hostile:
    """A hostile request."""

    kind: str
    raw: bytes
    method: str = "POST"
    patience: float = COMPLETE
    """Seconds to wait for a reply before the client closes its side."""


@dataclass(frozen=True)
class Reply:
    """A reply: none (status None), one of the HTTP server, or one of the application."""

    status: int | None
    headers: dict[str, str] = field(default_factory=dict)
    """Response headers. A header that came twice has both values, as in a browser."""
    body: bytes = b""

    @property
    def of_the_application(self) -> bool:
        """Whether the application replied, not the HTTP server in front of it."""
        return "x-request-id" in self.headers


def send(url: str, request: Hostile) -> Reply:
    """Return the reply on a new connection. Raises TimeoutError if the connection hangs."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), COMPLETE) as connection:
        try:
            connection.sendall(request.raw)
            if not select.select([connection], [], [], request.patience)[0]:
                connection.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(connection, method=request.method)
            response.begin()
            headers = {name.lower(): response.getheader(name, "") for name, _ in response.getheaders()}
            return Reply(response.status, headers, response.read())
        except (ConnectionError, http.client.HTTPException):  # closed before the reply, or before the whole request
            return Reply(None)


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/recommend", length: bytes | None = None) -> bytes:
    """Return a raw POST with additional header lines."""
    size = b"%d" % len(body) if length is None else length
    lines = [b"Host: x", b"Content-Type: application/json", b"Content-Length: " + size, b"Connection: close", *headers]
    return b"POST " + path + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


def _object(random: Random) -> bytes:
    """Return a JSON object some of whose fields are invalid, perhaps repeated."""
    parts = {b"history": b'["i3", "i7"]', b"k": b"5"}
    fields = [(random.choice(FIELDS).encode(), random.choice(VALUES)) for _ in range(random.choice((1, 1, 2, 3)))]
    pairs = [*parts.items(), *fields] if random.random() < 0.3 else [*{**parts, **dict(fields)}.items()]
    return b"{" + b",".join(b'"' + name + b'":' + value for name, value in pairs) + b"}"


def _fields(random: Random) -> Hostile:
    return Hostile("fields", post(_object(random)))


def _batch(random: Random) -> Hostile:
    some = [_object(random) if random.random() < 0.5 else b'{"history":["i1"]}' for _ in range(random.randint(0, 4))]
    body = random.choice((b'{"requests":[' + b",".join(some) + b"]}", b'{"requests":' + random.choice(VALUES) + b"}"))
    return Hostile("batch", post(body, path=b"/v1/recommend/batch"))


def _whole_bodies(random: Random) -> Hostile:
    body = random.choice((*VALUES, b"", b"{", b"\xef\xbb\xbf{}", random.randbytes(random.randint(1, 500))))
    return Hostile("bodies", post(body))


def _types(random: Random) -> Hostile:
    raw = post(b'{"history": ["i3"]}').replace(b"application/json", random.choice(TYPES))
    return Hostile("types", raw)


def _headers(random: Random) -> Hostile:
    raw = post(b'{"history": ["i3"]}', *random.sample(HEADERS, random.choice((1, 1, 2))))
    return Hostile("headers", raw, patience=UNCERTAIN)


def _lines(random: Random) -> Hostile:
    method, path = random.choice(METHODS), random.choice(PATHS)
    if random.random() < 0.5:
        method = b"GET"
    raw = method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return Hostile("lines", raw, method.decode("latin-1"), UNCERTAIN)


def _lengths(random: Random) -> Hostile:
    length = random.choice(
        (
            b"-1",
            b"1e3",
            b"+5",
            b"5, 6",
            b"0x10",
            b"9" * 30,
            b"2000000",
            b"",
            b"\xd9\xa3",
            b"3",
            b"19\r\nContent-Length: 4",
        )
    )
    return Hostile("lengths", post(b'{"history": ["i3"]}', length=length), patience=UNCERTAIN)


def _oversized(random: Random) -> Hostile:
    return Hostile("oversized", post(b'{"history": ["' + b"x" * random.randint(1 << 20, 3 << 20) + b'"]}'))


def _chunked(random: Random) -> Hostile:
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
    good = b'13\r\n{"history": ["i3"]}\r\n0\r\n\r\n'
    rest = random.choice(
        (
            chunk * 30 + b"0\r\n\r\n",
            chunk * 30,
            b"zz\r\n",
            b"-1\r\nx",
            b"f" * 40 + b"\r\n",
            b"5\r\nab",
            good,
            good + good,
            b"1;" + b"x" * 70_000,
        )
    )
    extra = random.choice((b"", b"", b"Content-Length: 5\r\n", b"Transfer-Encoding: gzip\r\n", b"Trailer: x\r\n"))
    return Hostile("chunked", head + extra + b"\r\n" + rest, patience=UNCERTAIN)


def _truncated(random: Random) -> Hostile:
    raw = post(_object(random))
    return Hostile("truncated", raw[: random.randint(1, min(len(raw) - 1, 5000))], patience=INCOMPLETE)


def _pipelined(random: Random) -> Hostile:
    good = post(b'{"history": ["i3"]}').replace(b"Connection: close\r\n", b"")
    return Hostile(
        "pipelined", good * random.randint(1, 5) + random.choice(GARBAGE) + random.randbytes(50), patience=UNCERTAIN
    )


def _garbage(random: Random) -> Hostile:
    return Hostile("garbage", random.choice((*GARBAGE, random.randbytes(random.randint(1, 5000)))), patience=UNCERTAIN)


KINDS: tuple[Callable[[Random], Hostile], ...] = (
    *(
        _fields,
        _fields,
        _fields,
        _batch,
        _whole_bodies,
        _types,
        _headers,
        _lines,
        _lines,
        _lengths,
        _oversized,
        _chunked,
    ),
    *(_truncated, _pipelined, _garbage),
)


def fault(request: Hostile, reply: Reply) -> str | None:
    """Return what is wrong with a reply, or None."""
    if reply.status is None:
        return "no answer" if request.patience == COMPLETE and len(request.raw) < LARGE else None
    if reply.status >= 500 and reply.status not in (503, 504):
        return "a server error"
    if "set-cookie" in reply.headers:
        return "a header that the client injected"
    if reply.of_the_application and reply.status >= 400 and reply.body:
        return _problem_fault(reply)
    return None


def _problem_fault(reply: Reply) -> str | None:
    try:
        problem: dict[str, Any] = json.loads(reply.body)
    except ValueError:
        return "not JSON"
    if set(problem) != {"detail", "request_id", "errors"} or not problem["detail"]:
        return "not a Problem"
    if problem["request_id"] != reply.headers["x-request-id"]:
        return "another request's id"
    return "a reply that is too large" if len(reply.body) > 20_000 else None


def good(url: str) -> Any:
    """Return the items of a valid request, which must be answered."""
    status, answer = ask(url, "/v1/recommend", VALID, timeout=20)
    assert status == 200
    return answer["items"]


def attack(url: str, seed: int, requests: int, good: Callable[[str], Any] = good) -> Counter[tuple[str, int | None]]:
    """Send hostile requests, and check that the result of `good` stays the same.

    Returns how often each kind of request was answered with each status.
    """
    random, expected = Random(seed), good(url)
    counts: Counter[tuple[str, int | None]] = Counter()
    for number in range(requests):
        request = random.choice(KINDS)(random)
        reply = send(url, request)
        wrong = fault(request, reply)
        assert wrong is None, f"{wrong}: {reply.status} {reply.body[:300]!r} to {request.kind} {request.raw[:600]!r}"
        counts[request.kind, reply.status] += 1
        assert number % 25 or good(url) == expected
    assert good(url) == expected
    return counts
