"""Raw HTTP requests that nobody means well with, from a seed, and what came back."""

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

from support.running_endpoint import ask

EXAMPLES = int(os.environ.get("L2D_RAY_HOSTILE_EXAMPLES", "20"))
"""What the number of requests is a multiple of."""
GOOD = {"history": ["i3", "i7", "i11"], "k": 5}
FIELDS = ("history", "k", "aggregation", "top_m", "exclude_seen", "deny", "allow", "unknown_items", "surprise")
VALUES = (
    *(
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"0.5",
        b"27.0",
        b"9" * 400,
        b"9" * 5000,
        b"-1",
        b"0x10",
    ),
    *(b'""', b'"i3"', b'"local"', b'"\\ud800"', b'"\\u0000"', b'"\\u202e\\u2066i3"', b'"\xff\xfe"', b'"\x00"', b"'i3'"),
    *(b"[]", b"{}", b"[[]]", b'["i3", "nope"]', b'["\\udfff"]', b'[{"title": "\\ud83d"}]', b'[{"title": 5}]', b"[3]"),
    *(b'[{"title": "x", "id": 1}]', b'["' + b"x" * 1_000_000 + b'"]', b'"' + b"x" * 1_000_000 + b'"'),
    *(b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900),
    *(
        b"[" + b'"i3",' * 200_000 + b'"i3"]',
        b"[" + b"0," * 400_000 + b"0]",
        b'[{"title": "\xe2\x80\xae\xf0\x9f\x98\x80"}]',
    ),
)
STEERING = (
    *(
        name + b": " + value
        for name in (
            b"X-Session-ID",
            b"x_session_id",
            b"Serve-Multiplexed-Model-ID",
            b"X-Request-Timeout-Seconds",
            b"X-Request-Disconnect-Disabled",
        )
        for value in (b"\xff", b"0.001", b"?1")
    ),
    *(b"X-Request-ID: " + bad for bad in (b"", b"\xff", b"<script>", b"a, b", b"a\r\nX-Request-ID: b c")),
)
"""By which a client would have Ray Serve's proxy do otherwise."""
HEADERS = (
    *STEERING,
    *(
        b"X-Request-ID: " + bad
        for bad in (b"", b"a b", b"x" * 65, b"\xff", b"../..", b"<script>", b"a\r\nSet-Cookie: injected=1")
    ),
    *(b"Authorization: " + bad for bad in (b"", b"Bearer", b"Bearer \xff\xfe", b"Basic eDp5", b"Bearer a b", b"\x00")),
    *(
        b"Content-Encoding: gzip",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"Accept: \xff",
        b"Cookie: =;;=",
        b"Range: bytes=9-1",
    ),
    *(
        b"Origin: null",
        b"Host:",
        b"Host: a\x00b",
        b"X-Forwarded-For: ::",
        b"No colon",
        b": no name",
        b" folded",
        b"A" * 70_000 + b": 1",
    ),
    b"\r\n".join(b"X-%d: %d" % (number, number) for number in range(3000)),
)
TYPES = (
    b"",
    b"text/plain",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data",
    b"application/json; charset=utf-16",
    b"\xff/\x00",
    b"application/vnd.api+json",
)
METHODS = (
    b"GET",
    b"PUT",
    b"DELETE",
    b"PATCH",
    b"HEAD",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"BREW",
    b"get",
    b"POST" * 500,
    b"\x00",
    b"",
)
PATHS = (
    b"/../../etc/passwd",
    b"/static/../api.py",
    b"/static/%2e%2e/api.py",
    b"/static/..%2f..%2fconfig.py",
    b"/static/%00",
    b"/static//etc/passwd",
    b"//",
    b"//evil.example/",
    b"/v1//recommend",
    b"/v1/recommend/",
    b"/%ff%fe",
    b"/%",
    b"/" + b"a" * 60_000,
    b"/" + b"a/" * 20_000,
    b"*",
    b"http://evil.example/v1/status",
    b"/v1/status;x=1",
    b"/v1/status#x",
    b"/?" + b"a=1&" * 10_000,
    b"/static/" + b"%2e%2e%2f" * 1000,
    b"x",
    *(
        b"/v1/items?query=" + bad
        for bad in (b"%00", b"%ff", b"%ed%a0%80", b"a%20" * 400, b"%5c%5c(.*", b"x" * 50_000, b"%e2%80%ae", b"\xff")
    ),
    *(b"/v1/items?most=" + bad for bad in (b"0", b"1e3", b"9" * 5000, b"-1", b"NaN", b"1&most=2", b"%d9%a3", b"1_0")),
)
GARBAGE = (
    *(b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n", b"\r\n\r\n\r\n"),
    *(b"\x00" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
)
COMPLETE, PERHAPS, NO = 20.0, 0.2, 0.0
"""Patience: with a request that is complete, one that may be, and one that is not."""
LARGE = 1 << 20
"""A request beyond it may be cut off before its answer is read."""


@dataclass(frozen=True)
class Hostile:
    """One request."""

    kind: str
    raw: bytes
    method: str = "POST"
    patience: float = COMPLETE
    """Seconds to wait for an answer before the client closes its side."""


@dataclass(frozen=True)
class Reply:
    """What came back: nothing (status None), the server's own words, or an answer of the application."""

    status: int | None
    headers: dict[str, str] = field(default_factory=dict)
    """One that came twice has both values, as in a browser."""
    body: bytes = b""

    @property
    def of_the_application(self) -> bool:
        """Whether the application answered, and not the HTTP server before it."""
        return "x-request-id" in self.headers


def send(url: str, request: Hostile) -> Reply:
    """What comes back on a connection of its own. Raises TimeoutError if the connection just hangs."""
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
        except (ConnectionError, http.client.HTTPException):  # closed without a word, or while we were still talking
            return Reply(None)


def hostile(random: Random) -> Hostile:
    """One of all kinds."""
    return random.choice(KINDS)(random)


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/recommend", length: bytes | None = None) -> bytes:
    """A raw POST with these header lines besides."""
    size = b"%d" % len(body) if length is None else length
    own = [b"Host: x", b"Content-Type: application/json", b"Content-Length: " + size, b"Connection: close", *headers]
    return b"POST " + path + b" HTTP/1.1\r\n" + b"\r\n".join(own) + b"\r\n\r\n" + body


def _object(random: Random) -> bytes:
    """A request some of whose fields are bad, perhaps twice there."""
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
    return Hostile("headers", raw, patience=PERHAPS)


def _lines(random: Random) -> Hostile:
    method, path = random.choice(METHODS), random.choice(PATHS)
    if random.random() < 0.5:
        method = b"GET"
    raw = method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return Hostile("lines", raw, method.decode("latin-1"), PERHAPS)


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
    return Hostile("lengths", post(b'{"history": ["i3"]}', length=length), patience=PERHAPS)


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
    return Hostile("chunked", head + extra + b"\r\n" + rest, patience=PERHAPS)


def _truncated(random: Random) -> Hostile:
    raw = post(_object(random))
    return Hostile("truncated", raw[: random.randint(1, min(len(raw) - 1, 5000))], patience=NO)


def _pipelined(random: Random) -> Hostile:
    good = post(b'{"history": ["i3"]}').replace(b"Connection: close\r\n", b"")
    return Hostile(
        "pipelined", good * random.randint(1, 5) + random.choice(GARBAGE) + random.randbytes(50), patience=PERHAPS
    )


def _garbage(random: Random) -> Hostile:
    return Hostile("garbage", random.choice((*GARBAGE, random.randbytes(random.randint(1, 5000)))), patience=PERHAPS)


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
    """What is wrong with a reply, if anything."""
    if reply.status is None:
        return "no answer" if request.patience == COMPLETE and len(request.raw) < LARGE else None
    if reply.status >= 500 and reply.status not in (503, 504):
        return "a server error"
    if "set-cookie" in reply.headers:
        return "a header of the client's making"
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
    return "an answer larger than its cause is worth" if len(reply.body) > 20_000 else None


def good(url: str) -> Any:
    """The items of a good request, which must still be answered."""
    status, answer = ask(url, "/v1/recommend", GOOD, timeout=20)
    assert status == 200
    return answer["items"]


def attack(url: str, seed: int, requests: int, good: Callable[[str], Any] = good) -> Counter[tuple[str, int | None]]:
    """How often which kind of request was answered with which status, while what is `good` stays the same."""
    random, right = Random(seed), good(url)
    counts: Counter[tuple[str, int | None]] = Counter()
    for number in range(requests):
        request = hostile(random)
        reply = send(url, request)
        wrong = fault(request, reply)
        assert wrong is None, f"{wrong}: {reply.status} {reply.body[:300]!r} to {request.kind} {request.raw[:600]!r}"
        counts[request.kind, reply.status] += 1
        assert number % 25 or good(url) == right
    assert good(url) == right
    return counts
