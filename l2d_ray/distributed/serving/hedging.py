"""How replicas are asked: again where one dies, another one beside it where one is silent, and which encoder first."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from grpc.aio import AioRpcError
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import ReplicaID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from l2d_ray.serve.engine import OverloadedError, UnavailableError
from l2d_ray.serve.releases import VersionError

T = TypeVar("T")
AWAY = (
    ActorDiedError,
    ActorUnavailableError,
    AioRpcError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    TimeoutError,
    VersionError,
)
ATTEMPTS = 3
"""How often a replica is asked that dies or hangs meanwhile: it may be another one each time. Of the encoders, as many
are known to the router of each session."""


async def in_words(what: str, asking: Awaitable[T | None]) -> T:
    """What `what` answers, or an error in a client's words; None is that it has no time."""
    try:
        answer = await asking
    except BackPressureError:
        answer = None
    except AWAY:
        raise UnavailableError(f"{what} is away; come again later") from None
    if answer is None:
        raise OverloadedError(f"too many requests wait for {what}; come again later")
    return answer


async def ask_one(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer of a replica; of another one, if it dies meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await ask()
        except AWAY:
            await asyncio.sleep(0.1)
    return await ask()


async def ask_besides(attempts: int, seconds: float, ask: Callable[[int], Coroutine[Any, Any, T | None]]) -> T | None:
    """The first answer of `ask(0)`, `ask(1)` and so on, in all so many: the next is asked after so many seconds.

    What was asked before goes on: its replica may hang, and another one is asked, or be slow, and still be the first.
    None or an error is no answer, and the next is asked at once. Without any answer: the last error, or None if there
    was none. Raises TimeoutError after the seconds of all attempts together.
    """
    now = asyncio.get_running_loop().time
    until, attempt = now() + attempts * seconds, 0
    asked, errors = set[asyncio.Task[T | None]](), list[BaseException]()
    try:
        while attempt < attempts or asked:
            if attempt < attempts:
                asked.add(asyncio.create_task(ask(attempt)))
                attempt += 1
            wait = seconds if attempt < attempts else max(0.0, until - now())
            done, asked = await asyncio.wait(asked, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if not done and attempt == attempts:
                raise TimeoutError
            errors += [error for task in done if (error := task.exception())]
            for task in done:
                if not task.exception() and (answer := task.result()) is not None:
                    return answer
        if errors:
            raise errors[-1]
        return None
    finally:
        for task in asked:
            task.cancel()


class EncoderRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Which encoder a history goes to: of its session always the same one, and at each further attempt the next."""

    def _lookup_ranked_replicas(self, routing_key: str) -> list[ReplicaID]:
        """Encoders in the order in which they are tried. What is of no session has a key without a space."""
        attempt, of_a_session, session = routing_key.partition(" ")
        ranked: list[ReplicaID] = super()._lookup_ranked_replicas(session if of_a_session else routing_key)
        first = int(attempt) % len(ranked) if of_a_session and ranked else 0
        return ranked[first:] + ranked[:first]
