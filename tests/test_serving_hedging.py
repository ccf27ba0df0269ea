"""How replicas are asked: which of them, how often, and what becomes of those that hang or fail."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID

from l2d_ray.config import ServeConfig
from l2d_ray.distributed.serving.hedging import EncoderRouter, ask_besides
from l2d_ray.distributed.serving.replicas import FEW, Replicas
from l2d_ray.serve.engine import OverloadedError, UnavailableError

SECONDS = 0.3
"""Until another one is asked."""
NEVER = 60.0


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([(0, "first")], "first"),
        ([(0, None)], None),
        ([(NEVER, "first")], TimeoutError),
        ([(NEVER, "first"), (0, "second")], "second"),
        ([(1.5, "first"), (NEVER, "second")], "first"),
        ([(2.5, "first"), (NEVER, "second")], TimeoutError),
        ([(0, None), (1.5, "second")], "second"),
        ([(1.5, "first"), (0, None)], "first"),
        ([(1.5, "first"), (0, ValueError)], "first"),
        ([(0, ValueError), (0, "second")], "second"),
        ([(0, None), (0, ValueError), (0, None)], ValueError),
        ([(0, ValueError), (NEVER, "second")], TimeoutError),
    ],
)
def test_the_first_answer_counts(outcomes: list[tuple[float, str | type[Exception] | None]], said: object) -> None:
    """Each of `outcomes`: after how many times `SECONDS` it is there, and what it is."""

    async def ask(attempt: int) -> str | None:
        after, outcome = outcomes[attempt]
        await asyncio.sleep(after * SECONDS)
        if isinstance(outcome, type):
            raise outcome
        return outcome

    async def scenario() -> str | None:
        try:
            return await ask_besides(len(outcomes), SECONDS, ask)
        finally:
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    if isinstance(said, type):
        with pytest.raises(said):
            asyncio.run(scenario())
    else:
        assert asyncio.run(scenario()) == said


def router(encoders: int) -> EncoderRouter:
    """Of so many encoders."""
    own = EncoderRouter.__new__(EncoderRouter)
    own._deployment_id = DeploymentID("Encoder")
    own._num_virtual_nodes, own._num_fallback_replicas = 100, 2
    own._rebuild_ring(frozenset(ReplicaID(f"{number}", own._deployment_id) for number in range(encoders)))
    return own


def first(routed: EncoderRouter, key: str) -> str:
    """The encoder that is tried first."""
    found: str = routed._lookup_ranked_replicas(key)[0].unique_id
    return found


@pytest.mark.parametrize("encoders", [1, 2, 3, 5])
def test_each_attempt_goes_to_another_encoder_and_the_first_always_to_the_same(encoders: int) -> None:
    own, again = router(encoders), router(encoders)
    begun = Counter()
    for session in ("7", "a title of some words", *map(str, range(200))):
        tried = [first(own, f"{attempt} {session}") for attempt in range(min(encoders, 3))]
        assert len({*tried}) == len(tried)
        assert first(again, f"0 {session}") == tried[0]
        begun[tried[0]] += 1
    assert len(begun) == encoders
    assert router(0)._lookup_ranked_replicas("1 session") == []
    assert first(own, "without-a-session") == first(again, "without-a-session")


@pytest.mark.parametrize("encoders", [1, 2])
@pytest.mark.parametrize("trouble", [None, NEVER])
def test_another_encoder_is_asked_where_one_has_no_time_or_hangs(encoders: int, trouble: float | None) -> None:
    routed = router(encoders)

    class Handle:
        """Of encoders, of which one answers that it has no time, or not at all."""

        def options(self, session_id: str) -> SimpleNamespace:
            async def remote(version: str, history: list[int], within: float) -> str | None:
                assert 0 < within <= SECONDS
                if first(routed, session_id) != "0":
                    return "state"
                await asyncio.sleep(trouble or 0)
                return None

            return SimpleNamespace(encode=SimpleNamespace(remote=remote))

    async def outcomes() -> Counter[str]:
        settings = ServeConfig(encoders=encoders, deadline_seconds=SECONDS)
        asked = Replicas.__new__(Replicas)
        asked.encoder, asked.settings = Handle(), settings  # type: ignore[assignment]
        all_at_once = (asked.encode("v", [1], str(session)) for session in range(100))
        return Counter(map(str, await asyncio.gather(*all_at_once, return_exceptions=True)))

    refused = UnavailableError("the model is away; come again later")
    if trouble is None:
        refused = OverloadedError("too many requests wait for the model; come again later")
    assert asyncio.run(outcomes()) == {str(refused) if encoders == 1 else "state": 100}


class Shard:
    """A deployment of a shard of which so many replicas hang; each time another one is asked."""

    def __init__(self, hanging: int, seconds: float = 0.0) -> None:
        self.ask, self.asked, self.left = SimpleNamespace(remote=self.remote), 0, 0
        self.hanging, self.seconds = hanging, seconds

    async def remote(self, question: str) -> str:
        self.asked += 1
        try:
            await asyncio.sleep(60 if self.asked <= self.hanging else self.seconds)
        except asyncio.CancelledError:
            self.left += 1
            raise
        return question


def ask_shard(shard: Shard, count: int, others: int = 0, within: float = 0.3) -> str:
    """What a gateway gets within so many seconds."""
    asked = Replicas.__new__(Replicas)
    asked.shards, asked.settings = [shard], ServeConfig(shard_seconds=within, shard_replicas=count)  # type: ignore[list-item]
    asked._shards, asked._asking = SimpleNamespace(observe=lambda *_, **__: None), Counter({0: others})
    return str(asyncio.run(asked._ask_part(0, "ask", "question")))


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_a_replica_that_hangs_is_not_waited_for_where_there_is_another(hanging: int) -> None:
    shard = Shard(hanging)
    assert ask_shard(shard, 2) == "question"
    assert (shard.asked, shard.left) == (hanging + 1, hanging)


def test_a_slow_replica_may_still_answer() -> None:
    shard = Shard(0, seconds=2.5)
    assert ask_shard(shard, 2, within=3) == "question"
    assert (shard.asked, shard.left) == (3, 2)


def test_a_shard_that_hangs_altogether_is_away() -> None:
    for count, others, asked in ((1, 0, 1), (2, 0, 3), (2, FEW, 1)):
        shard = Shard(9)
        with pytest.raises(TimeoutError):
            ask_shard(shard, count, others)
        assert (shard.asked, shard.left) == (asked, asked)
