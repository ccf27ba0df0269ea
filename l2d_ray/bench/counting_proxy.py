"""A proxy before an object store that counts its requests. It speaks HTTP without TLS, as a server in a test does."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
"""Headers of one connection, which the proxy does not pass on."""


@dataclass(frozen=True)
class Request:
    """A request."""

    method: str
    path: str

    @property
    def is_write(self) -> bool:
        """True for what stores charge as a write, which a listing is, too."""
        return self.method in ("PUT", "POST") or (self.method == "GET" and "list-type=" in self.path)


@dataclass(frozen=True)
class Response:
    """A response of the server."""

    status: int
    headers: dict[str, str]
    content: bytes
    length: str | None = None
    """Content-Length, if it is not the length of the content: the answer to HEAD has none."""


class Handler(BaseHTTPRequestHandler):
    """Passes a request on and counts it. Subclasses may answer differently."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]
    requests: list[Request]

    def answer(self, body: bytes) -> Response | None:
        """Return the response to this request; None closes the connection."""
        return self.forward(body)

    def forward(self, body: bytes) -> Response | None:
        """Return the server's response; None if it does not answer."""
        upstream = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            content = response.read()
        except OSError:
            return None
        finally:
            upstream.close()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP}
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        return Response(response.status, headers, content, length)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        response = self.answer(body)
        self.requests.append(Request(self.command, unquote(self.path)))
        if not response:
            self.close_connection = True
            return
        self.send_response_only(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", response.length or str(len(response.content)))
        self.end_headers()
        if self.command != "HEAD":  # its answer has no content, and what follows would be taken for the next one
            self.wfile.write(response.content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def log_message(self, *arguments: Any) -> None:
        """Be quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: Any) -> None:
        """Be quiet when a client leaves."""


@contextmanager
def counting_proxy(host: str, port: int, handler: type[Handler] = Handler) -> Iterator[tuple[int, list[Request]]]:
    """Run a proxy before a server while the block runs; yield its port and the list of its requests, which grows."""
    requests: list[Request] = []
    made = type("Handler", (handler,), {"upstream": (host, port), "requests": requests})
    with _Server(("127.0.0.1", 0), made) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield int(proxy.server_address[1]), requests
        proxy.shutdown()
