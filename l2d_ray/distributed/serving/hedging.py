"""Calls to replicas: retried if a replica dies, hedged if one is silent, and answered in a client's words."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from grpc.aio import AioRpcError
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from l2d_ray.distributed.serving.ray_private import RankingRouter
from l2d_ray.serve.engine import OverloadedError, UnavailableError
from l2d_ray.serve.release_cache import VersionError

T = TypeVar("T")
UNAVAILABLE = (
    ActorDiedError,
    ActorUnavailableError,
    AioRpcError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    TimeoutError,
    VersionError,
)
"""Errors of a call whose replica died, hangs or does not hold the release."""
ATTEMPTS = 3
"""Attempts at a call. Each may reach another replica; the router ranks as many encoders for each session."""
RETRY_SECONDS = 0.1
"""Pause between attempts after an error."""


async def await_reply(component: str, reply: Awaitable[T | None]) -> T:
    """Return the reply of a component. A reply of None means that it has no time.

    Raises UnavailableError if no replica replies, and OverloadedError if the component has no time. Both name it.
    """
    try:
        answer = await reply
    except BackPressureError:
        answer = None
    except UNAVAILABLE:
        raise UnavailableError(f"{component} is unavailable; try again later") from None
    if answer is None:
        raise OverloadedError(f"too many requests are waiting for {component}; try again later")
    return answer


async def retry(call: Callable[[], Awaitable[T]]) -> T:
    """Return the reply of a call; call again, perhaps another replica, if the replica is unavailable."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await call()
        except UNAVAILABLE:
            await asyncio.sleep(RETRY_SECONDS)
    return await call()


async def hedge(attempts: int, seconds: float, call: Callable[[int], Coroutine[Any, Any, T | None]]) -> T | None:
    """Return the first reply of `call(0)`, `call(1)`, … `call(attempts - 1)`. Each starts `seconds` after the last.

    Earlier calls continue, since a slow replica may still be the first to reply. After an error or a reply of None,
    the next call starts at once. Without any reply, raises the last error, or returns None if there was none. Raises
    TimeoutError after `attempts * seconds`.
    """
    now = asyncio.get_running_loop().time
    deadline, attempt = now() + attempts * seconds, 0
    calls, errors = set[asyncio.Task[T | None]](), list[BaseException]()
    try:
        while attempt < attempts or calls:
            if attempt < attempts:
                calls.add(asyncio.create_task(call(attempt)))
                attempt += 1
            wait = seconds if attempt < attempts else max(0.0, deadline - now())
            done, calls = await asyncio.wait(calls, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if not done and attempt == attempts:
                raise TimeoutError
            errors += [error for task in done if (error := task.exception())]
            for task in done:
                if not task.exception() and (reply := task.result()) is not None:
                    return reply
        if errors:
            raise errors[-1]
        return None
    finally:
        for task in calls:
            task.cancel()


class EncoderRouter(RankingRouter):
    """Router of the encoders: a session always goes to the same one, and each further attempt to the next."""

    @staticmethod
    def key(attempt: int, session: str) -> str:
        """Return the session id to send with an attempt at a call, counted from 0."""
        return f"{attempt} {session}"

    def ranked_replicas(self, key: str) -> list[Any]:
        """Return the encoders in the order in which they are tried. `key` without a space belongs to no session."""
        attempt, has_session, session = key.partition(" ")
        ranked = super().ranked_replicas(session if has_session else key)
        first = int(attempt) % len(ranked) if has_session and ranked else 0
        return ranked[first:] + ranked[:first]
