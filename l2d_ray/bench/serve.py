"""Benchmark of the endpoint: throughput and latency under load, next to those of a bare loop and of beam search."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray

from l2d_ray.bench.load import Load, load
from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.data.samples import choose_samples
from l2d_ray.distributed.serving.endpoint import endpoint
from l2d_ray.distributed.serving.promotion import encoder_counts
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.errors import InputError
from l2d_ray.index.engine import engine
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.schema import Split
from l2d_ray.serve.releases import Release
from l2d_ray.stages.index_plan import dataset_of, plan_index
from l2d_ray.timing import timed

SHARES = (0.25, 0.5, 0.75, 0.9, 1.1)
"""Rates of the open loop, as shares of the saturated throughput."""
STEPS = 10
"""Items by which the history of a returning user grows."""
K = 20
"""Items that a request asks for."""
BEAMS = 20
CLIENTS = 24
"""Smallest number of clients that saturate the endpoint."""
IDLE_REQUESTS = 30
"""Requests to the idle endpoint."""
BEAM_SEARCHES = 100
"""Histories for beam search; the load ends before they run out."""
SIMULATED = 100_000
"""Arrivals of the simulated queue."""
PATH, BEAM_PATH = "/v1/recommend", "/v1/beam_search"


@dataclass(frozen=True)
class ServeBenchmark:
    """Results for requests of 20 items by L2D-G, with one encoder of `workers.cpus` threads.

    Histories have the lengths of the test samples; their items are drawn at random from those. So hardly any request
    can use what is cached of another, except for returning users.
    """

    bare_per_second: float
    """Test histories per second in a bare loop that encodes them, packed, in batches larger than an encoder's."""
    bare_ms: float
    """Median milliseconds of one history in a bare loop of model and search."""
    idle_ms: float
    """Median milliseconds of one request to the idle endpoint, measured by the client."""
    overhead_ms: float
    """Median of the difference of the two, over the same histories, measured in turns."""
    saturated: Load
    """Load by `clients` that always wait for an answer. A full batch waits while another one runs, as far as answers
    come within half of the deadline."""
    clients: int
    """Number of clients in that load, and in the load of returning users."""
    saturated_over_bare: float
    """Ratio of `saturated.per_second` to `bare_per_second`."""
    batch_requests: float
    """Mean number of requests per batch while saturated."""
    open_loop: list[Load]
    """Loads at fixed rates: shares of the saturated throughput."""
    tail_at_half: float
    """p99 over p50 at half of the saturated throughput."""
    bare_tail: float
    """p99 over p50 in the bare loop: how much the lengths of histories differ."""
    queue_tail: float
    """p99 over p50 of a simulated queue in front of the bare loop: the tail that chance causes at any single server.
    Arrivals are random at the same rate, first come, first served."""
    returning: Load
    """Load of returning users: each request adds one item to a history seen before, and is sent once."""
    cache_hits: float
    """Share of these requests whose history's beginning was cached."""
    beam_search: Load
    """Load of constrained beam search with 20 beams; its model has as many threads."""
    over_beam_search: float
    """Ratio of saturated throughput to that of beam search."""
    returning_over_beam_search: float
    """Ratio of returning users' throughput to that of beam search."""
    threads: int
    """Threads of a model."""


def bench_serve(config: Config) -> ServeBenchmark:
    """Serve the release of `config` and load it. Raises InputError if the release is missing or cannot be measured."""
    torch.set_num_threads(config.workers.cpus)
    engine.set_threads(1)
    release, histories = _prepare(config)
    bare, requests = _Bare(release), _Requests(release, histories)
    crowd = max(CLIENTS, 2 * bare.batch_size(histories))
    bare_per_second = bare.per_second(histories, crowd, config.bench.repeats)
    in_time = int(bare_per_second * config.serve.deadline_seconds / 2)
    clients = max(CLIENTS, min(crowd, in_time, config.serve.max_waiting))
    seconds = config.bench.seconds
    with endpoint(config.replace({"serve.encoders": 1, "serve.beams": BEAMS})) as url:
        load(url, PATH, requests.new(IDLE_REQUESTS), seconds=None)  # warm-up
        pairs = _idle_pairs(url, bare, requests)
        before = encoder_counts()
        saturated = load(url, PATH, requests.new(2 * bare_per_second * seconds), seconds, clients=clients)
        after = encoder_counts()
        rates = [round(share * saturated.per_second, 2) for share in SHARES]
        open_loop = [load(url, PATH, requests.new(2 * rate * seconds), seconds, rate=rate) for rate in rates]
        first, grown = requests.returning()
        load(url, PATH, first, seconds=None, clients=clients)
        start = encoder_counts()
        returning = load(url, PATH, grown, seconds=None, clients=clients)
        end = encoder_counts()
        load(url, BEAM_PATH, requests.new(1), seconds=None)  # warm-up
        beam_search = load(url, BEAM_PATH, requests.new(BEAM_SEARCHES), 3 * seconds, clients=2)
    bare_seconds = [timed(partial(bare.recommend, history))[0] for history in histories]
    at_half = open_loop[SHARES.index(0.5)]
    queue_seconds = queued(requests.random.choice(bare_seconds, SIMULATED), 0.5 * saturated.per_second)
    return ServeBenchmark(
        bare_per_second=round(bare_per_second, 2),
        bare_ms=round(median(alone for alone, _ in pairs), 1),
        idle_ms=round(median(served for _, served in pairs), 1),
        overhead_ms=round(median(served - alone for alone, served in pairs), 1),
        saturated=saturated,
        clients=clients,
        saturated_over_bare=round(saturated.per_second / bare_per_second, 3),
        batch_requests=round((after["requests"] - before["requests"]) / (after["batches"] - before["batches"]), 1),
        open_loop=open_loop,
        tail_at_half=round(at_half.p99_ms / at_half.p50_ms, 2),
        bare_tail=_tail(bare_seconds),
        queue_tail=_tail(queue_seconds),
        returning=returning,
        cache_hits=round((end["hits"] - start["hits"]) / (end["requests"] - start["requests"]), 3),
        beam_search=beam_search,
        over_beam_search=round(saturated.per_second / beam_search.per_second, 1),
        returning_over_beam_search=round(returning.per_second / beam_search.per_second, 1),
        threads=config.workers.cpus,
    )


def queued(seconds_N: Sequence[float] | NDArray[np.float64], rate: float) -> list[float]:
    """Return the seconds from arrival to answer in a queue of one server: random arrivals, `rate` per second.

    `seconds_N` are the service times, in the order of arrival. Lindley's recursion: a request waits for the rest of
    its predecessor's time.
    """
    gaps_N = np.random.default_rng(0).exponential(1 / rate, len(seconds_N))
    totals, total = list[float](), 0.0
    for seconds, gap in zip(seconds_N, gaps_N, strict=True):
        total = max(0.0, total - gap) + seconds
        totals.append(total)
    return totals


def _prepare(config: Config) -> tuple[Release, list[list[int]]]:
    """Return the release and the histories of test samples."""
    release = Release.plan(config)
    samples = choose_samples(dataset_of(plan_index(config)), Split.TEST, config.bench.samples)
    histories = [sample.history[-config.serve.max_history :].tolist() for sample in samples if len(sample.history)]
    if not any(len(history) > STEPS for history in histories):
        raise InputError(
            f"{config.workspace}: no test sample has a history of more than {STEPS} items; give a workspace with longer"
            " ones"
        )
    return release, histories


class _Requests:
    """Bodies of requests whose histories have the lengths of given ones."""

    def __init__(self, release: Release, histories: Sequence[list[int]]) -> None:
        self._ids = release.items()["item_id"].to_pylist()
        self._histories, self._items = histories, np.concatenate(histories)
        self.random = np.random.default_rng(0)

    def histories(self, count: float) -> list[list[int]]:
        """Draw histories of which nothing is cached."""
        lengths = [len(self._histories[n % len(self._histories)]) for n in range(math.ceil(count))]
        return [self.random.choice(self._items, length).tolist() for length in lengths]

    def new(self, count: float) -> list[dict[str, Any]]:
        """Return bodies of histories of which nothing is cached."""
        return self.bodies(self.histories(count))

    def returning(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the first bodies of returning users, then those whose histories grow by one item each."""
        long = [history for history in self._histories if len(history) > STEPS]
        first = [history[: len(history) - STEPS] for history in long]
        grown = [history[: len(history) - STEPS + step] for step in range(1, STEPS + 1) for history in long]
        return self.bodies(first), self.bodies(grown)

    def bodies(self, histories: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """Return the body of each history."""
        return [
            {"history": [self._ids[item] for item in history], "k": K, "aggregation": "global"} for history in histories
        ]


class _Bare:
    """The model and the index in this process."""

    def __init__(self, release: Release) -> None:
        config, reader = release.config, release.open()
        prior = config.index.prior_in(config.index.space)
        self._encoder = HistoryEncoder(config, release.items()["title"].to_pylist())
        self._index = ShardedIndex.open(reader.workspace, release.index).with_prior(prior)

    def batch_size(self, histories: Sequence[list[int]]) -> int:
        """Return how many histories fit in one batch of an encoder."""
        tokens = np.mean([self._encoder.tokens_to_run(self._encoder.phrased(history)) for history in histories])
        return math.ceil(self._encoder.tokens_per_chunk / float(tokens))

    def per_second(self, histories: Sequence[list[int]], count: int, repeats: int) -> float:
        """Return the histories encoded per second, `count` at a time. Median of `repeats` runs."""
        batches = [histories[start : start + count] for start in range(0, len(histories), count)]
        self._encoder.encode(batches[0])
        seconds = [timed(lambda: [self._encoder.encode(batch) for batch in batches])[0] for _ in range(repeats)]
        return len(histories) / median(seconds)

    def recommend(self, history: list[int]) -> None:
        """Encode one history and search."""
        states_UD = self._encoder.encode([history]).states_UD
        self._index.recommend(states_UD, [Query.after(history, K)])


def _idle_pairs(url: str, bare: _Bare, requests: _Requests) -> list[tuple[float, float]]:
    """Return the milliseconds of each history in the bare loop and at the idle endpoint, measured in turns."""
    client = HTTPConnection(urlsplit(url).netloc)
    return [
        (
            1000 * timed(partial(bare.recommend, history))[0],
            1000 * timed(partial(_post, client, *requests.bodies([history])))[0],
        )
        for history in requests.histories(IDLE_REQUESTS)
    ]


def _post(client: HTTPConnection, body: dict[str, Any]) -> None:
    client.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
    response = client.getresponse()
    response.read()
    if response.status != HTTPStatus.OK:
        raise RuntimeError(f"{PATH}: answered {response.status} instead of 200")


def _tail(seconds: Sequence[float]) -> float:
    """Return p99 over p50."""
    p50, p99 = np.percentile(seconds, [50, 99])
    return round(float(p99 / p50), 2)
