"""Metrics of the endpoint. Ray exports them to Prometheus with the prefix `ray_`; cluster/grafana.json shows them."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve

from l2d_ray.serve.engine import OverloadedError, UnavailableError

MILLISECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000]
OUTCOMES = {OverloadedError: "overloaded", UnavailableError: "unavailable", asyncio.CancelledError: "cancelled"}
LATE_SHARE = 0.95
"""Share of its deadline after which a cancelled request counts as late. Before, its client left or its batch failed."""


def milliseconds_since(started: float) -> float:
    """Return the milliseconds since `started`, a time of `time.perf_counter()`."""
    return 1000 * (time.perf_counter() - started)


class GatewayMetrics:
    """Metrics of a gateway: outcomes of requests, and latencies of their phases and of the shards."""

    def __init__(self) -> None:
        self._outcomes = serve.metrics.Counter(
            "l2d_ray_requests", "Requests by outcome", tag_keys=("outcome", "version", "method")
        )
        self._phases = serve.metrics.Histogram(
            "l2d_ray_phase_ms", "Milliseconds per phase of a request", MILLISECONDS, tag_keys=("phase",)
        )
        self._shards = serve.metrics.Histogram(
            "l2d_ray_shard_ms", "Milliseconds until a group of shards replied", MILLISECONDS, tag_keys=("shard",)
        )

    @contextmanager
    def request(self, version: str, method: str, deadline_seconds: float) -> Iterator[list[str]]:
        """Count a request by its outcome: the last element of the list, or an exception's."""
        outcomes, started = ["failed"], time.monotonic()
        try:
            yield outcomes
        except BaseException as error:
            outcomes.append(OUTCOMES.get(type(error), "failed"))
            if outcomes[-1] == "cancelled" and time.monotonic() - started > LATE_SHARE * deadline_seconds:
                outcomes.append("late")
            raise
        finally:
            self._outcomes.inc(tags={"outcome": outcomes[-1], "version": version, "method": method})

    def phases(self, **milliseconds: float) -> None:
        """Record the duration of each phase of a request."""
        for phase, duration in milliseconds.items():
            self._phases.observe(duration, tags={"phase": phase})

    def shard(self, group: int, milliseconds: float) -> None:
        """Record the latency of a group of shards."""
        self._shards.observe(milliseconds, tags={"shard": str(group)})


class EncoderMetrics:
    """Metrics of an encoder: sizes of its batches, its queue and its cache."""

    def __init__(self) -> None:
        self._tokens = serve.metrics.Histogram(
            "l2d_ray_batch_tokens", "Distinct tokens per batch", boundaries=[64, 256, 1024, 4096, 16384]
        )
        self._requests = serve.metrics.Histogram(
            "l2d_ray_batch_requests", "Requests per batch", boundaries=[1, 2, 4, 8, 16, 32, 64]
        )
        self._hits = serve.metrics.Counter("l2d_ray_cache_hits", "Histories whose beginning was cached")
        self._misses = serve.metrics.Counter("l2d_ray_cache_misses", "Histories that ran from their first token")
        self._bytes = serve.metrics.Gauge("l2d_ray_cache_bytes", "Bytes of cached keys and values")
        self._waiting = serve.metrics.Gauge("l2d_ray_waiting", "Requests waiting for a batch")
        self.counts: Counter[str] = Counter()
        """Totals since the start: batches, requests, tokens that went through the model, cache hits."""

    def batch(self, requests: int, tokens: int, hits: int) -> None:
        """Record a batch. `hits` is the number of its histories whose beginning was cached."""
        self.counts.update(batches=1, requests=requests, tokens=tokens, hits=hits)
        self._requests.observe(requests)
        self._tokens.observe(tokens)
        for counter, count in ((self._hits, hits), (self._misses, requests - hits)):
            if count:
                counter.inc(count)

    def state(self, waiting: int, cache_bytes: int) -> None:
        """Record the length of the queue and the size of the cache."""
        self._waiting.set(waiting)
        self._bytes.set(cache_bytes)
