"""A real S3 server on this machine (SeaweedFS), and a proxy that counts requests to it and makes some of them fail."""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import obstore
from obstore.store import S3Store

BUCKET = "bucket"
KEY, SECRET = "tester", "secret-of-the-tester"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
"""Environment variables of the clients."""
STARTS_WITHIN = 60.0
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class S3Server:
    """A server with one bucket. It keeps its data when it is stopped and started again."""

    folder: Path
    port: int
    _process: "subprocess.Popen[bytes] | None" = None

    def uri(self, prefix: str, port: int | None = None, options: str = "") -> str:
        """Return the URI of a workspace, through the proxy at `port` if that is given."""
        query = f"region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port or self.port}"
        return f"s3://{BUCKET}/{prefix}?{query}{options}"

    def start(self) -> None:
        """Start the server and wait until it takes objects."""
        ports = [f"-{name}={free_port()}" for name in PORTS]
        identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (self.folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [
                Path(sys.executable).with_name("weed"),
                *("server", f"-dir={data}", "-ip=127.0.0.1", "-s3", f"-s3.port={self.port}", *ports),
                *(f"-s3.config={self.folder / 'identities.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                "-s3.autoCreateBucket=false",
                *("-master.telemetry=false", "-volume.max=20", "-master.volumeSizeLimitMB=256"),
            ],
            cwd=self.folder,
            env=os.environ | {"HOME": str(self.folder)},
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "server.log").open("ab"),
        )

        store = S3Store(
            BUCKET,
            endpoint=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                self._create_bucket()
                obstore.put(store, "ready", b"")
                return
            except Exception:
                assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)

    def stop(self) -> None:
        """Kill the server."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _create_bucket(self) -> None:
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)


PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server while the block runs."""
    server = S3Server(folder, free_port())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@dataclass
class Faults:
    """Faults that a proxy makes; they may be changed while it runs."""

    refused: float = 0.0
    """Share of requests that are answered with 503 and not passed on."""
    lost: float = 0.0
    """Share of requests that are passed on, but whose response the client does not get."""
    unconditional: bool = False
    """Whether the server ignores the condition of a PUT."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request so far."""
    seed: int = 0


@contextmanager
def faulty_proxy(server: S3Server, faults: Faults) -> Iterator[int]:
    """Run a proxy before the server while the block runs, and yield its port."""
    dice, lock = random.Random(faults.seed), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                faults.requests.append(f"{self.command} {unquote(self.path)}")
                luck = dice.random()
            if faults.unconditional and "If-None-Match" in self.headers:
                self._reply(200, {"ETag": '"written"'}, b"")
                return
            if luck < faults.refused:
                self._reply(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>")
                return
            upstream = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders(body)
                response = upstream.getresponse()
                content = response.read()
            except OSError:
                self.close_connection = True
                return
            finally:
                upstream.close()
            if luck < faults.refused + faults.lost:
                self.close_connection = True
                return
            headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP}
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._reply(response.status, headers, content, length)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

        def _reply(self, status: int, headers: dict[str, str], content: bytes, length: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Be quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            """Be quiet when a client leaves."""

    with Server(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield int(proxy.server_address[1])
        proxy.shutdown()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
