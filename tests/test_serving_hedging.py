"""Hedged calls, and the router that ranks encoders."""

import asyncio
from collections import Counter

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID

from l2d_ray.distributed.serving.hedging import EncoderRouter, hedge

SECONDS = 0.3
"""Seconds until the next call."""
NEVER = 60.0


@pytest.mark.parametrize(
    ("outcomes", "expected"),
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
def test_the_first_reply_counts(outcomes: list[tuple[float, str | type[Exception] | None]], expected: object) -> None:
    """Each outcome is a reply or an error, and the multiple of `SECONDS` after which it comes."""

    async def call(attempt: int) -> str | None:
        after, outcome = outcomes[attempt]
        await asyncio.sleep(after * SECONDS)
        if isinstance(outcome, type):
            raise outcome
        return outcome

    async def scenario() -> str | None:
        try:
            return await hedge(len(outcomes), SECONDS, call)
        finally:
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    if isinstance(expected, type):
        with pytest.raises(expected):
            asyncio.run(scenario())
    else:
        assert asyncio.run(scenario()) == expected


def router(encoders: int) -> EncoderRouter:
    """Return a router of this many encoders."""
    made = EncoderRouter.__new__(EncoderRouter)
    made._deployment_id = DeploymentID("Encoder")
    made._num_virtual_nodes, made._num_fallback_replicas = 100, 2
    made._rebuild_ring(frozenset(ReplicaID(f"{number}", made._deployment_id) for number in range(encoders)))
    return made


def first(router: EncoderRouter, key: str) -> str:
    """Return the id of the encoder that is tried first. Ray calls the router by this private name."""
    found: str = router._lookup_ranked_replicas(key)[0].unique_id
    return found


@pytest.mark.parametrize("encoders", [1, 2, 3, 5])
def test_a_session_starts_at_one_encoder_and_each_attempt_goes_to_another(encoders: int) -> None:
    one, same = router(encoders), router(encoders)
    starts = Counter[str]()
    for session in ("7", "a title of some words", *map(str, range(200))):
        tried = [first(one, EncoderRouter.key(attempt, session)) for attempt in range(min(encoders, 3))]
        assert len({*tried}) == len(tried)
        assert first(same, EncoderRouter.key(0, session)) == tried[0]
        starts[tried[0]] += 1
    assert len(starts) == encoders
    assert router(0)._lookup_ranked_replicas("1 session") == []
    assert first(one, "without-a-session") == first(same, "without-a-session")
