"""Handles of deployments whose replicas are coroutines of this process."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any


class FakeHandle:
    """Stand-in for Ray Serve's DeploymentHandle: each method calls a coroutine function of this process."""

    def __init__(self, session: str | None = None, **methods: Callable[..., Awaitable[Any]]) -> None:
        self.session = session
        self._methods = methods

    def options(self, session_id: str | None = None, **_: Any) -> "FakeHandle":
        return FakeHandle(session_id, **self._methods)

    def __getattr__(self, name: str) -> SimpleNamespace:
        method = self._methods[name]
        if self.session is None:
            return SimpleNamespace(remote=method)
        return SimpleNamespace(remote=lambda *arguments, **named: method(self.session, *arguments, **named))
