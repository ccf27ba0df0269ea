"""Calls of a gateway to encoders, and its wait for a release."""

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from support.fake_handles import FakeHandle

from l2d_ray.config import ServeConfig
from l2d_ray.distributed.serving import replicas
from l2d_ray.distributed.serving.hedging import EncoderRouter
from l2d_ray.distributed.serving.replicas import Replicas
from l2d_ray.errors import InputError
from l2d_ray.serve.engine import OverloadedError, UnavailableError

SECONDS = 0.3
"""Deadline of an encoder."""
HANGS = 60.0


def component(versions: Sequence[str], starting: float = 0) -> FakeHandle:
    """Return a component that holds these versions, after `starting` seconds."""

    async def reply() -> Sequence[str]:
        await asyncio.sleep(starting)
        return versions

    return FakeHandle(versions=reply)


def wait_for_release(
    encoder: Sequence[str], *groups: Sequence[str], starting: float = 0, partial: bool = False, absent: int = 0
) -> None:
    """Wait until an encoder and shard groups, which hold these versions, hold "v". `absent` groups never start."""
    handles = [component(versions, starting) for versions in groups]
    handles += [FakeHandle(versions=asyncio.Event().wait)] * absent
    called = Replicas(component(encoder, starting), handles, component([]), ServeConfig(partial=partial))
    asyncio.run(asyncio.wait_for(called.wait_for_release("v"), 5))


def test_a_gateway_does_not_wait_for_beam_searchers() -> None:
    wait_for_release(["v"], ["u", "v"])


def test_a_gateway_waits_for_slow_starts_but_not_for_other_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "START_SECONDS", 0.1)
    wait_for_release(["v"], ["v"], starting=0.3)
    with pytest.raises(InputError, match=r"^MemoryShard-1: loaded another release than v; "):
        wait_for_release(["v"], ["v"], ["u"])


def test_a_gateway_starts_without_a_shard_group_only_if_answers_may_be_partial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "START_SECONDS", 0.1)
    wait_for_release(["v"], ["v"], partial=True, absent=1)
    for partial, groups in ((False, [["v"]]), (True, [])):  # never without any group
        with pytest.raises(TimeoutError):
            wait_for_release(["v"], *groups, partial=partial, absent=1)
    with pytest.raises(InputError, match=r"^MemoryShard-0: loaded another release than v; "):
        wait_for_release(["v"], ["u"], ["v"], partial=True, absent=1)


@pytest.mark.parametrize("encoders", [1, 2])
@pytest.mark.parametrize("delay", [0.0, HANGS], ids=["has no time", "hangs"])
def test_another_encoder_is_called_if_one_has_no_time_or_hangs(encoders: int, delay: float) -> None:
    router = EncoderRouter.__new__(EncoderRouter)
    router._deployment_id = DeploymentID("Encoder")
    router._num_virtual_nodes, router._num_fallback_replicas = 100, 2
    router._rebuild_ring(frozenset(ReplicaID(f"{number}", router._deployment_id) for number in range(encoders)))

    async def encode(session: str, version: str, history: list[int], within: float) -> str | None:
        assert 0 < within <= SECONDS
        if router.ranked_replicas(session)[0].unique_id != "0":
            return "state"
        await asyncio.sleep(delay)
        return None

    async def outcomes() -> Counter[str]:
        settings = ServeConfig(encoders=encoders, deadline_seconds=SECONDS)
        called = Replicas(FakeHandle(encode=encode), [], None, settings)
        calls = (called.encode("v", [1], str(session)) for session in range(100))
        return Counter(map(str, await asyncio.gather(*calls, return_exceptions=True)))

    refusal: Exception = UnavailableError("the model is unavailable; try again later")
    if not delay:
        refusal = OverloadedError("too many requests are waiting for the model; try again later")
    assert asyncio.run(outcomes()) == {str(refusal) if encoders == 1 else "state": 100}


def test_beam_search_is_refused_where_it_is_not_offered() -> None:
    called = Replicas(component(["v"]), [], None, ServeConfig())
    with pytest.raises(UnavailableError, match="not offered here"):
        asyncio.run(called.search_beams("v", None))  # type: ignore[arg-type]
