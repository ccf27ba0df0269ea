"""What Locust runs to load an endpoint (`load.py`): requests one after the other, or at random moments of a given rate.

The latter is an open loop: a slow answer does not delay the next request, as it does not in the world.
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
    """One client, or, with a rate, all of them."""

    concurrency = 2000
    network_timeout = connection_timeout = 120.0

    def on_start(self) -> None:
        """Begin the schedule of arrivals."""
        self.environment.stats.get("200", "POST")  # from now on Locust counts its seconds, not from the first answer
        self.open, self.due = Group(), time.monotonic()

    @task  # type: ignore[untyped-decorator]
    def arrive(self) -> None:
        """Ask, and wait for the answer or only for the next arrival."""
        if not RATE:
            self.ask()
            return
        self.open.spawn(self.ask)
        self.due += random.expovariate(RATE)
        gevent.sleep(max(0.0, self.due - time.monotonic()))

    def ask(self) -> None:
        """One request, noted under its status."""
        body = next(BODIES, None)
        if body is None:
            gevent.spawn(self.environment.runner.quit)  # from within it would wait for itself
            raise StopUser
        with self.client.post(LOAD["path"], json=body, catch_response=True) as response:
            response.request_meta["name"] = str(response.status_code)
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and not RATE:
            gevent.sleep(1)  # Retry-After

    def on_stop(self) -> None:
        """Wait for what is under way: the slowest answers count, too."""
        self.open.join(timeout=60)
