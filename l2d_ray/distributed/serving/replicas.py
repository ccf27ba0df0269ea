"""One release, asked of the replicas that hold it: retries, deadlines, what to do where one is away, and metrics."""

import asyncio
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.context import _set_request_context
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.samples import last_window
from l2d_ray.distributed.serving.hedging import ATTEMPTS, AWAY, ask_besides, ask_one, in_words
from l2d_ray.errors import InputError
from l2d_ray.index import aggregations
from l2d_ray.index.exchange import partition
from l2d_ray.serve.catalogue import Catalogue
from l2d_ray.serve.engine import Answer, OverloadedError, Query, UnavailableError
from l2d_ray.serve.releases import Release

FEW = 16
"""Questions on their way to a shard up to which one more is asked again if it takes long: many are a load, which that
would make worse."""
ENCODING = 0.8
"""Share of a request's deadline in which the model must be done."""
START_SECONDS = 120
"""A new gateway waits for so long for parts that have started to hold its release; where an answer may be partial, also
for shards to start."""
AT_ONCE = 1024
"""Hidden size up to which the map of the index takes no longer than to have a thread do it (0.1 ms at 576)."""
MILLISECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000]
OUTCOMES = {OverloadedError: "overloaded", UnavailableError: "unavailable", asyncio.CancelledError: "cancelled"}
ALMOST = 0.95
"""What is cancelled after this share of its deadline is late; before, its client left, or one of its batch failed."""


class Replicas:
    """What a gateway asks: encoders, shards and, where they are offered, beams."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        shards: Sequence[DeploymentHandle],
        beams: DeploymentHandle | None,
        settings: ServeConfig,
    ) -> None:
        """Handles of the deployments; `shards` in the order of the parts."""
        # What they answer is small: straight by gRPC, not through Ray's object store.
        self.encoder, *self.shards = (part.options(_by_reference=False) for part in (encoder, *shards))
        self.beams = beams and beams.options(_by_reference=False)
        self.settings = settings
        self._asking: Counter[int] = Counter()
        self._outcomes = serve.metrics.Counter(
            "l2d_ray_requests", "Requests", tag_keys=("outcome", "version", "method")
        )
        self._phases = serve.metrics.Histogram(
            "l2d_ray_phase_ms", "Milliseconds of a request's phases", MILLISECONDS, tag_keys=("phase",)
        )
        self._shards = serve.metrics.Histogram(
            "l2d_ray_shard_ms", "Milliseconds until a shard answered", MILLISECONDS, tag_keys=("shard",)
        )

    async def agree(self, version: str) -> None:
        """Return when an encoder and every shard hold that release, however long they take to start.

        Where an answer may be partial, all but one of the shards may be away for longer than `START_SECONDS`. Raises
        InputError if those that have started still hold others then.
        """
        # Not beams, which are optional: one search at a time, whoever asks waits for it.
        parts = {"Encoder": self.encoder} | {f"MemoryShard-{n}": shard for n, shard in enumerate(self.shards)}
        deadline = math.inf
        while True:
            held = dict(zip(parts, await asyncio.gather(*map(self._held, parts.values())), strict=True))
            others = [name for name, versions in held.items() if versions and version not in versions]
            if not others and any(versions for name, versions in held.items() if name != "Encoder"):
                return
            if others:
                deadline = min(deadline, time.monotonic() + START_SECONDS)
                if time.monotonic() > deadline:
                    raise InputError(f"{', '.join(others)}: of another release than {version}")
            await asyncio.sleep(1)

    async def _held(self, part: DeploymentHandle) -> list[str]:
        """The versions that a part holds, once it has started; none of a shard that is away where that is allowed."""
        patience = START_SECONDS if self.settings.partial and part is not self.encoder else None
        try:
            async with asyncio.timeout(patience):
                versions: list[str] = await part.versions.remote()
        except AWAY:
            if patience is None:
                raise
            return []
        return versions

    async def encode(self, version: str, history: list[int | str], session: str) -> NDArray[np.float32]:
        """The state [D] of one history. Those of one session go to one encoder, as long as it is there and has time.

        Where it has none, others are asked; where it does not answer, others beside it.
        """
        seconds = ENCODING * self.settings.deadline_seconds
        deadline = time.monotonic() + seconds

        async def ask(attempt: int) -> NDArray[np.float32] | None:
            # Requests of a batch share the id that their HTTP request has, by which this router tells requests apart.
            _set_request_context(_internal_request_id=uuid.uuid4().hex)
            encoder = self.encoder.options(session_id=f"{attempt} {session}")
            state_D: NDArray[np.float32] | None
            state_D = await ask_one(lambda: encoder.encode.remote(version, history, within=deadline - time.monotonic()))
            return state_D

        attempts = min(ATTEMPTS, self.settings.encoders)
        return await in_words("the model", ask_besides(attempts, seconds / attempts, ask))

    async def search_beams(self, version: str, query: Query) -> ScoredItems:
        """The items that constrained beam search finds."""
        if self.beams is None:
            raise UnavailableError("beam search is not offered here (serve.beams)")
        search = self.beams.recommend
        items: ScoredItems = await in_words("beam search", ask_one(lambda: search.remote(version, query)))
        return items

    async def search(
        self, version: str, shards: int, query: Query, queries_UD: Float64
    ) -> tuple[ScoredItems, list[int]]:
        """The items of one query, a matrix of one row, and those of so many shards that were missing."""
        parts, away = partition(shards, len(self.shards)), set[int]()
        while True:
            missing = [shard for number in sorted(away) for shard in parts[number]]
            if missing and (not self.settings.partial or len(missing) == shards):
                raise UnavailableError(f"shards {missing} of the index are away; come again later")
            present = {number: len(own) for number, own in enumerate(parts) if len(own) and number not in away}
            try:
                (items,) = await self._ask_parts(version, query, queries_UD, present)
            except _PartsAwayError as error:
                away |= error.numbers
            else:
                return items, missing

    async def _ask_parts(
        self, version: str, query: Query, queries_UD: Float64, present: dict[int, int]
    ) -> list[ScoredItems]:
        """`present`: the parts to ask, and how many shards each has."""
        found: list[ScoredItems]
        if len(present) == 1:  # all hops are within it
            (number,) = present
            try:
                found = await self._ask_part(number, "recommend", version, query, queries_UD)
            except AWAY:
                raise _PartsAwayError({number}) from None
            return found
        exchange = aggregations.recommend(queries_UD, [query])  # type: ignore[list-item]
        request = next(exchange)
        while True:
            requests = request.split(present.values())
            asked = [
                self._ask_part(number, "ask", version, share) for number, share in zip(present, requests, strict=True)
            ]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            away = {number for number, answer in zip(present, answers, strict=True) if isinstance(answer, AWAY)}
            if away:
                raise _PartsAwayError(away)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            try:
                request = exchange.send([one for answer in answers for one in answer])  # type: ignore[union-attr]
            except StopIteration as done:
                found = done.value
                return found

    async def _ask_part(self, number: int, method: str, *arguments: Any) -> Any:
        started = time.perf_counter()
        attempts = ATTEMPTS if self.settings.shard_replicas > 1 and self._asking[number] < FEW else 1
        seconds = self.settings.shard_seconds / attempts
        self._asking[number] += 1
        try:
            shard = getattr(self.shards[number], method)
            answer = await ask_besides(attempts, seconds, lambda _: ask_one(lambda: shard.remote(*arguments)))
        finally:
            self._asking[number] -= 1
        self._shards.observe(_since(started), tags={"shard": str(number)})
        return answer

    @contextmanager
    def counted(self, version: str, method: str) -> Iterator[list[str]]:
        """Count a request by its outcome: the last of the list, or what the exception says."""
        outcomes, started, settings = ["failed"], time.monotonic(), self.settings
        deadline = settings.beam_seconds if method == "beam_search" else settings.deadline_seconds
        try:
            yield outcomes
        except BaseException as error:
            outcomes.append(OUTCOMES.get(type(error), "failed"))
            if outcomes[-1] == "cancelled" and time.monotonic() - started > ALMOST * deadline:
                outcomes.append("late")
            raise
        finally:
            self._outcomes.inc(tags={"outcome": outcomes[-1], "version": version, "method": method})

    def timed(self, **phases: float) -> None:
        """Note how many milliseconds the phases of a request took."""
        for phase, milliseconds in phases.items():
            self._phases.observe(milliseconds, tags={"phase": phase})


class ServedRelease:
    """As in `Served`."""

    def __init__(self, release: Release, replicas: Replicas) -> None:
        """Raises InputError if the release is not there any more."""
        reader, config = release.open(), release.config
        manifest, self._replicas, self._space = reader.manifest, replicas, reader.space
        identity = manifest.identity
        self.version, self.top_m = release.version, config.recommend.top_m
        self.exclude_seen = config.recommend.exclude_seen
        self.catalogue = Catalogue(release.items())
        self.snapshot = release.index.removeprefix("index/").rpartition("/")[0]
        self.model = identity.base_model[:12] + (f"+{identity.adapter[:12]}" if identity.adapter else "")
        self._manifest, self._window = manifest, config.history

    async def recommend(self, query: Query) -> Answer:
        """As in `Served`."""
        with self._replicas.counted(self.version, "recommend") as outcomes:
            started = time.perf_counter()
            # A user who returns has a window that begins as before: its first item stands for him.
            window = last_window(len(query.history), self._window.max_items, self._window.stride)
            session = str(query.history[window][0])
            state_D = await self._replicas.encode(self.version, query.history, session)
            encode_ms = _since(started)
            if state_D.size > AT_ONCE:
                queries_UD = await asyncio.to_thread(self._space, state_D[None])
            else:
                queries_UD = self._space(state_D[None])
            items, missing = await self._replicas.search(self.version, len(self._manifest.shards), query, queries_UD)
            total_ms = _since(started)
            outcomes.append("partial" if missing else "ok")
        self._replicas.timed(encode=encode_ms, search=total_ms - encode_ms, total=total_ms)
        return Answer(items, encode_ms, total_ms - encode_ms, missing)

    async def beam_search(self, query: Query) -> Answer:
        """As in `Served`."""
        with self._replicas.counted(self.version, "beam_search") as outcomes:
            started = time.perf_counter()
            items = await self._replicas.search_beams(self.version, query)
            outcomes.append("ok")
        return Answer(items, _since(started), 0.0)

    def status(self) -> dict[str, Any]:
        """As in `Served`."""
        manifest = self._manifest
        return {
            "items": len(self.catalogue.ids),
            "rows": manifest.rows,
            "items_with_rows": manifest.items,
            "shards": len(manifest.shards),
            "space": manifest.space,
            "factory": manifest.factory,
            "quality": manifest.quality.model_dump(),
            "top_m": self.top_m,
            "beams": self._replicas.settings.beams,
        }


@dataclass
class _PartsAwayError(Exception):
    numbers: set[int]


def _since(started: float) -> float:
    """Milliseconds."""
    return 1000 * (time.perf_counter() - started)
