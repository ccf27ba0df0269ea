"""Hostile requests over a real socket: the application answers every one and keeps running."""

import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from random import Random

import psutil
import pytest
from support.hostile_requests import EXAMPLES, KINDS, attack, good
from support.live_endpoint import LIMITS, started

pytestmark = pytest.mark.slow
REQUESTS = 15 * EXAMPLES
"""Raw requests in all rounds."""
ROUNDS = 3
MB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Yield the URL and the process of an endpoint in a separate process."""
    with started(tmp_path_factory.mktemp("hostile")) as server:
        yield server


def test_hostile_requests_are_answered_and_do_not_leak_memory(server: tuple[str, psutil.Process]) -> None:
    url, process = server
    attack(url, 0, min(REQUESTS, 300))  # warm-up: caches fill once
    before, counts, started_at = process.memory_info().rss, Counter[tuple[str, int | None]](), time.monotonic()
    for seed in range(ROUNDS):
        counts += attack(url, seed + 1, REQUESTS // ROUNDS)
        print(f"round {seed + 1}: {process.memory_info().rss / MB:.0f} MB")
    after = process.memory_info().rss
    statuses: Counter[int | None] = Counter()
    for (_, status), count in counts.items():
        statuses[status] += count
    print(
        f"{counts.total()} requests in {time.monotonic() - started_at:.1f} s: {dict(statuses)};"
        f" RSS {before / MB:.0f} -> {after / MB:.0f} MB; {sorted(counts.items(), key=str)}"
    )
    assert {kind for kind, _ in counts} == {make(Random(0)).kind for make in KINDS}
    assert after - before < 32 * MB


def test_slow_clients_do_not_slow_the_others(server: tuple[str, psutil.Process]) -> None:
    url, process = server
    host, _, port = url.removeprefix("http://").partition(":")
    expected, files = good(url), process.num_fds()
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    clients = [socket.create_connection((host, int(port)), 10) for _ in range(50)]
    for number, client in enumerate(clients):
        client.sendall(head + (b"\r\n{" if number % 2 else b"X-Slow: "))
    stop = threading.Event()

    def send_slowly() -> None:
        for client in itertools.cycle(clients):
            if stop.wait(0.005):
                return
            try:
                client.sendall(b" ")
            except OSError:  # the endpoint has closed the connection
                stop.wait(0.005)

    thread = threading.Thread(target=send_slowly)
    thread.start()
    try:
        seconds = []
        for _ in range(30):
            began = time.perf_counter()
            assert good(url) == expected
            seconds.append(time.perf_counter() - began)
        print(f"valid requests during 50 slow ones: {1000 * max(seconds):.0f} ms at most")
        assert sorted(seconds)[15] < 1
    finally:
        stop.set()
        thread.join()
        for client in clients:
            client.close()
    assert good(url) == expected
    deadline = time.monotonic() + 20
    while process.num_fds() > files + 2:
        assert time.monotonic() < deadline, "connections stay open after their clients have left"
        time.sleep(0.05)


def test_a_body_that_does_not_arrive_gets_408(server: tuple[str, psutil.Process]) -> None:
    host, _, port = server[0].removeprefix("http://").partition(":")
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection((host, int(port)), LIMITS.deadline_seconds + 1) as client:
        client.sendall(head)
        assert client.recv(100).startswith(b"HTTP/1.1 408")
