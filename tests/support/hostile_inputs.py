"""Invalid and malicious parts of HTTP requests: field values, header lines, methods, paths and garbage."""

FIELDS = (
    *("history", "k", "recommender", "aggregation", "top_m", "exclude_seen", "deny", "allow", "unknown_items"),
    "surprise",
)
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
CONTROL_HEADERS = (
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
"""Header lines by which a client tries to control Ray Serve's proxy."""
HEADERS = (
    *CONTROL_HEADERS,
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
