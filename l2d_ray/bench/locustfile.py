"""Locust file of `load.py`: requests one after the other, or at random moments with a given rate.

The latter is an open loop: a slow answer does not delay the next request, because real users do not wait for others.
"""

import json
import os
import random
import time
from http import HTTPStatus
from itertools import cycle
from pathlib import Path

import gevent
from gevent.pool import Group
from locust import FastHttpUser, task
from locust.exception import StopUser

LOAD = json.loads(Path(os.environ["L2D_RAY_LOAD"]).read_text())
RATE = LOAD["rate"]
BODIES = iter(LOAD["bodies"]) if LOAD["once"] else cycle(LOAD["bodies"])


class Client(FastHttpUser):  # type: ignore[misc]
    """One client; with a rate, all of them."""

    concurrency = 2000
    network_timeout = connection_timeout = 120.0

    def on_start(self) -> None:
        """Start the schedule of arrivals."""
        self.environment.stats.get("200", "POST")  # Locust counts seconds from here, not from the first answer
        self.open, self.due = Group(), time.monotonic()

    @task  # type: ignore[untyped-decorator]
    def arrive(self) -> None:
        """Send a request, and wait for its answer; with a rate, for the next arrival."""
        if not RATE:
            self.send()
            return
        self.open.spawn(self.send)
        self.due += random.expovariate(RATE)
        gevent.sleep(max(0.0, self.due - time.monotonic()))

    def send(self) -> None:
        """Send a request and record it under its status."""
        body = next(BODIES, None)
        if body is None:
            gevent.spawn(self.environment.runner.quit)  # called here, it would wait for itself
            raise StopUser
        with self.client.post(LOAD["path"], json=body, catch_response=True) as response:
            response.request_meta["name"] = str(response.status_code)
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and not RATE:
            gevent.sleep(1)  # Retry-After

    def on_stop(self) -> None:
        """Wait for the open requests: the slowest answers count, too."""
        self.open.join(timeout=60)
