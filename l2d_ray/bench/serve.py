"""The endpoint under load: against the model and the search in a bare loop, and against beam search served likewise."""

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

RATES = (0.25, 0.5, 0.75, 0.9, 1.1)
"""Of the saturation."""
STEPS = 10
"""Items by which a returning user's history grows."""
K, BEAMS, CLIENTS, IDLE = 20, 20, 24, 30
ARRIVALS = 100_000
"""Of the queue that is computed."""
PATH, BEAM_PATH = "/v1/recommend", "/v1/beam_search"


@dataclass(frozen=True)
class ServeBenchmark:
    """Requests for 20 items by L2D-G; the model has one encoder of `workers.cpus` threads.

    Histories are as long as those of the test samples, of items drawn from them: but for returning users, hardly any
    request can use what is cached of another.
    """

    bare_per_second: float
    """Test histories that a bare loop encodes, packed, in batches larger than an encoder's."""
    bare_ms: float
    """One history in a bare loop: model and search. Median."""
    idle_ms: float
    """One request to the idle endpoint, seen by the client. Median."""
    overhead_ms: float
    """The difference, of the same histories, which take turns. Median."""
    saturated: Load
    """So many clients that a full batch waits while another one runs, or as many as are answered in half the deadline.
    """
    clients: int
    """In that load, and in that of the returning users."""
    saturated_over_bare: float
    batch_requests: float
    """Mean, while saturated."""
    open_loop: list[Load]
    """At shares of the saturation."""
    tail_at_half: float
    """p99 over p50 at half of the saturation."""
    bare_tail: float
    """The same of the histories in a bare loop: how much their lengths differ."""
    queue_tail: float
    """The same where they arrive at that rate and wait for one another before that loop, first come, first served:
    what chance does to a single server, however good."""
    returning: Load
    """Each request adds one item to a history seen before; each once, however long that takes."""
    cache_hits: float
    """Share of these that found their history's beginning."""
    beam_search: Load
    """Constrained beam search, 20 beams, a model of the same threads."""
    over_beam_search: float
    returning_over_beam_search: float
    threads: int


def bench_serve(config: Config) -> ServeBenchmark:
    """Serve the release of `config` on its port and load it. Raises InputError if it is not there."""
    torch.set_num_threads(config.workers.cpus)
    engine.set_threads(1)
    release, histories = _prepare(config)
    ids = release.items()["item_id"].to_pylist()

    def bodies(of: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        return [{"history": [ids[item] for item in history], "k": K, "aggregation": "global"} for history in of]

    bare = _Bare(release)
    crowd = max(CLIENTS, 2 * bare.most_at_once(histories))
    bare_per_second = bare.per_second(histories, crowd, config.bench.repeats)
    in_time = int(bare_per_second * config.serve.deadline_seconds / 2)
    clients = max(CLIENTS, min(crowd, in_time, config.serve.max_waiting))
    seconds, random, chosen = config.bench.seconds, np.random.default_rng(0), np.concatenate(histories)
    growing = [
        history[: len(history) - STEPS + step]
        for step in range(STEPS + 1)
        for history in histories
        if len(history) > STEPS
    ]
    first = bodies(growing[: len(growing) // (STEPS + 1)])

    def drawn(count: float) -> list[list[int]]:
        """Histories of which nothing is cached."""
        lengths = [len(histories[n % len(histories)]) for n in range(math.ceil(count))]
        return [random.choice(chosen, length).tolist() for length in lengths]

    def new(count: float) -> list[dict[str, Any]]:
        return bodies(drawn(count))

    with endpoint(_with(config, beams=BEAMS)) as url:
        load(url, PATH, new(IDLE), seconds=None)
        client = HTTPConnection(urlsplit(url).netloc)
        pairs = [
            (1000 * timed(partial(bare.recommend, own))[0], 1000 * timed(partial(_post, client, *bodies([own])))[0])
            for own in drawn(IDLE)
        ]
        before = encoder_counts()
        saturated = load(url, PATH, new(2 * bare_per_second * seconds), seconds, clients=clients)
        after = encoder_counts()
        rates = [round(share * saturated.per_second, 2) for share in RATES]
        open_loop = [load(url, PATH, new(2 * rate * seconds), seconds, rate=rate) for rate in rates]
        load(url, PATH, first, seconds=None, clients=clients)
        start = encoder_counts()
        returning = load(url, PATH, bodies(growing[len(first) :]), seconds=None, clients=clients)
        end = encoder_counts()
        load(url, BEAM_PATH, new(1), seconds=None)
        beam_search = load(url, BEAM_PATH, new(100), 3 * seconds, clients=2)
    bare_seconds = bare.seconds(histories)
    return ServeBenchmark(
        bare_per_second=round(bare_per_second, 2),
        bare_ms=round(median(alone for alone, _ in pairs), 1),
        idle_ms=round(median(asked for _, asked in pairs), 1),
        overhead_ms=round(median(asked - alone for alone, asked in pairs), 1),
        saturated=saturated,
        clients=clients,
        saturated_over_bare=round(saturated.per_second / bare_per_second, 3),
        batch_requests=round((after["requests"] - before["requests"]) / (after["batches"] - before["batches"]), 1),
        open_loop=open_loop,
        tail_at_half=round(open_loop[RATES.index(0.5)].p99_ms / open_loop[RATES.index(0.5)].p50_ms, 2),
        bare_tail=_tail(bare_seconds),
        queue_tail=_tail(queued(random.choice(bare_seconds, ARRIVALS), 0.5 * saturated.per_second)),
        returning=returning,
        cache_hits=round((end["hits"] - start["hits"]) / (end["requests"] - start["requests"]), 3),
        beam_search=beam_search,
        over_beam_search=round(saturated.per_second / beam_search.per_second, 1),
        returning_over_beam_search=round(returning.per_second / beam_search.per_second, 1),
        threads=config.workers.cpus,
    )


def _prepare(config: Config) -> tuple[Release, list[list[int]]]:
    release = Release.plan(config)
    samples = choose_samples(dataset_of(plan_index(config)), Split.TEST, config.bench.samples)
    histories = [s.history[-config.serve.max_history :].tolist() for s in samples if s.history.size]
    if not any(len(history) > STEPS for history in histories):
        raise InputError(f"{config.workspace}: no test sample has a history of more than {STEPS} items to ask with")
    return release, histories


class _Bare:
    """The model and the index in this process."""

    def __init__(self, release: Release) -> None:
        config, reader = release.config, release.open()
        prior = config.index.prior_in(config.index.space)
        self._encoder = HistoryEncoder(config, release.items()["title"].to_pylist())
        self._index = ShardedIndex.open(reader.workspace, release.index).with_prior(prior)

    def most_at_once(self, histories: Sequence[list[int]]) -> int:
        """How many fit in one batch of an encoder."""
        tokens = np.mean([self._encoder.tokens_to_run(self._encoder.phrased(own)) for own in histories])
        return math.ceil(self._encoder.tokens_per_chunk / float(tokens))

    def per_second(self, histories: Sequence[list[int]], count: int, repeats: int) -> float:
        """Histories encoded, so many at a time."""
        batches = [histories[at : at + count] for at in range(0, len(histories), count)]
        self._encoder.encode(batches[0])
        seconds = [timed(lambda: [self._encoder.encode(batch) for batch in batches])[0] for _ in range(repeats)]
        return len(histories) / median(seconds)

    def seconds(self, histories: Sequence[list[int]]) -> list[float]:
        """Of `recommend`, for each."""
        return [timed(partial(self.recommend, own))[0] for own in histories]

    def recommend(self, history: list[int]) -> None:
        """One history."""
        states_UD = self._encoder.encode([history]).states_UD
        self._index.recommend(states_UD, [Query.after(history, K)])


def queued(seconds_N: Sequence[float] | NDArray[np.float64], rate: float) -> list[float]:
    """From arrival to answer, where so many a second arrive at random and are served in turn, for so many seconds each.

    Lindley's recursion: each waits for what the one before it had still to wait for and be served when it arrived.
    """
    gaps_N = np.random.default_rng(0).exponential(1 / rate, len(seconds_N))
    totals, total = list[float](), 0.0
    for seconds, gap in zip(seconds_N, gaps_N, strict=True):
        total = max(0.0, total - gap) + seconds
        totals.append(total)
    return totals


def _tail(seconds: Sequence[float]) -> float:
    """p99 over p50."""
    p50, p99 = np.percentile(seconds, [50, 99])
    return round(float(p99 / p50), 2)


def _post(client: HTTPConnection, body: dict[str, Any]) -> None:
    client.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
    response = client.getresponse()
    response.read()
    assert response.status == HTTPStatus.OK


def _with(config: Config, **serve: Any) -> Config:
    return config.replace({"serve.encoders": 1} | {f"serve.{key}": value for key, value in serve.items()})
