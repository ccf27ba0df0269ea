"""An endpoint as a user starts it, on a real Ray Serve: requests, load and promotions."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from l2d_ray.distributed.serving.haproxy import free_ports
from support.small_workspace import command, environment, wait_for


@dataclass(frozen=True)
class Reply:
    """A reply as a client received it."""

    status: int
    """HTTP status; 0: no response."""
    body: Any
    """Decoded JSON, else the text or the error."""
    headers: dict[str, str] = field(default_factory=dict)
    sent: float = 0
    """Time of the request, in seconds of time.monotonic()."""
    seconds: float = 0
    """Seconds until the response."""
    question: int = 0
    """Number of the body, in a load."""


def ask(url: str, path: str, body: dict[str, Any] | None = None, timeout: float = 60) -> tuple[int, dict[str, Any]]:
    """Send a request and return the status and the body."""
    reply = request(url, path, body, timeout)
    return reply.status, reply.body


def request(url: str, path: str, body: dict[str, Any] | None = None, timeout: float = 60, question: int = 0) -> Reply:
    """Send a GET, or a POST if there is a body, on a new connection."""
    data, sent = None if body is None else json.dumps(body).encode(), time.monotonic()

    def reply(status: int, text: str, headers: Any = ()) -> Reply:
        with contextlib.suppress(ValueError):
            return Reply(status, json.loads(text), dict(headers), sent, time.monotonic() - sent, question)
        return Reply(status, text, dict(headers), sent, time.monotonic() - sent, question)

    one = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(one, timeout=timeout) as response:
            return reply(response.status, response.read(), response.headers)
    except urllib.error.HTTPError as error:
        return reply(error.code, error.read().decode(), error.headers)
    except OSError as error:
        return reply(0, repr(error))


@contextlib.contextmanager
def load(url: str, bodies: Sequence[dict[str, Any]], rate: float) -> Iterator[list[Reply]]:
    """Send `bodies` in turn, `rate` per second, without waiting for replies. All replies are there after the block."""
    replies: list[Reply] = []
    stop = threading.Event()

    def send(number: int) -> None:
        question = number % len(bodies)
        replies.append(request(url, "/v1/recommend", bodies[question], question=question))

    def keep_sending(pool: ThreadPoolExecutor) -> None:
        started = time.monotonic()
        for number in count():
            if stop.wait(max(0.0, started + number / rate - time.monotonic())):
                return
            pool.submit(send, number)

    with ThreadPoolExecutor(200) as pool:
        sender = threading.Thread(target=keep_sending, args=[pool])
        sender.start()
        try:
            yield replies
        finally:
            stop.set()
            sender.join()


@dataclass(frozen=True)
class Running:
    """A running endpoint."""

    url: str
    log: Path
    """Its stderr."""
    settings: dict[str, Any]
    """Settings that it was started with."""
    operator: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Ends the process that runs promotions."""

    def promotion(self, folder: Path, **settings: Any) -> list[str]:
        """Return the command that promotes the release of a workspace."""
        return command("promote", folder, **self.settings, **settings)

    def environment(self) -> dict[str, str]:
        """Return the environment in which that command finds this endpoint."""
        (address,) = re.findall(r"RAY_ADDRESS=(\S+)", self.log.read_text())
        return environment() | {"RAY_ADDRESS": address}

    def promote(self, folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run that command in the process that is already started."""
        _, *script = self.promotion(folder, **settings)
        return self._run(script)

    def counts(self) -> dict[str, int]:
        """Return the totals of the encoders."""
        run = self._run([str(Path(__file__).with_name("encoder_counts.py"))])
        run.check_returncode()
        found: dict[str, int] = Counter(json.loads(run.stdout.splitlines()[-1]))
        return found

    def _run(self, script: list[str]) -> subprocess.CompletedProcess[str]:
        process = self._operating
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(script) + "\n")
        process.stdin.flush()
        return subprocess.CompletedProcess(script, *json.loads(process.stdout.readline()))

    @cached_property
    def _operating(self) -> subprocess.Popen[str]:
        pipe, job = subprocess.PIPE, [sys.executable, str(Path(__file__).with_name("scripts.py"))]
        process = subprocess.Popen(job, env=self.environment(), stdin=pipe, stdout=pipe, text=True)
        self.operator.callback(process.kill)
        return process

    def version(self) -> str:
        """Return the version that is served."""
        version: str = ask(self.url, "/v1/status")[1]["version"]
        return version


@contextlib.contextmanager
def running(folder: Path, log: Path, **settings: Any) -> Iterator[Running]:
    """Serve a workspace, with stderr in `log`. After the block, check that SIGINT stops it with a result line."""
    (port,) = free_ports(1)
    job = command("serve", folder, **settings, **{"serve.port": port})
    with log.open("w") as stderr:
        process = subprocess.Popen(job, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        wait_for(lambda: "serving at" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        endpoint = Running(f"http://127.0.0.1:{port}", log, settings)
        with endpoint.operator:
            yield endpoint
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert json.loads(stdout.splitlines()[-1])["url"] == f"http://127.0.0.1:{port}"
    finally:
        process.kill()
