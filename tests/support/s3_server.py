"""A real S3 server on this machine (SeaweedFS), and a proxy that counts requests to it and makes some of them fail."""

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
from pathlib import Path

import obstore
from obstore.store import S3Store

from l2d_ray.bench.counting_proxy import Handler, Request, Response, counting_proxy

BUCKET = "bucket"
KEY, SECRET = "tester", "secret-of-the-tester"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
"""Environment variables of the clients."""
STARTS_WITHIN = 60.0
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


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
    requests: list[Request] = field(default_factory=list)
    """Every request so far."""
    seed: int = 0


@contextmanager
def faulty_proxy(server: S3Server, faults: Faults) -> Iterator[int]:
    """Run a proxy before the server while the block runs, and yield its port."""
    dice, lock = random.Random(faults.seed), threading.Lock()

    class Faulty(Handler):
        def answer(self, body: bytes) -> Response | None:
            with lock:
                luck = dice.random()
            if faults.unconditional and "If-None-Match" in self.headers:
                return Response(200, {"ETag": '"written"'}, b"")
            if luck < faults.refused:
                return Response(503, {}, SLOW_DOWN)
            response = self.forward(body)
            return None if luck < faults.refused + faults.lost else response

    with counting_proxy("127.0.0.1", server.port, Faulty) as (port, requests):
        faults.requests = requests
        yield port


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
