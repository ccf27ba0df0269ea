"""Bearer keys: which ones are accepted, and routes that require one."""

import asyncio
import hmac
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from l2d_ray.errors import InputError
from l2d_ray.serve.engine import UnavailableError

KEYS_VARIABLE = "L2D_RAY_KEYS"
"""Environment variable that holds keys."""


@dataclass(frozen=True)
class Keys:
    """The accepted keys: those of an environment variable (separated by commas) and of a file (one per line).

    The file is read again on every check, so that keys can be rotated without a restart. Without a variable and a
    file, every request is accepted.
    """

    variable: str
    file: str | None = None

    def required(self) -> bool:
        """Return whether a request needs a key."""
        return self.file is not None or bool(self._from_environment())

    def accepts(self, key: str | None) -> bool:
        """Return whether `key` is accepted. Compares with each key in constant time.

        Raises OSError if the file cannot be read.
        """
        given = (key or "").encode("latin-1", "replace")  # HTTP headers are decoded as Latin-1
        matches = [hmac.compare_digest(given, known.encode()) for known in self._all()]
        return any(matches) or not self.required()

    def check(self) -> None:
        """Raise InputError if the file cannot be read or holds no key."""
        try:
            if self.required() and not self._all():
                raise InputError(f"serve.keys_file={self.file!r}: the file holds no key; write one key per line")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"serve.keys_file={self.file!r}: cannot be read ({error}); name a readable text file"
            ) from None

    def _all(self) -> list[str]:
        lines = Path(self.file).read_text().splitlines() if self.file else []
        return [key for line in lines if (key := line.strip())] + self._from_environment()

    def _from_environment(self) -> list[str]:
        return [key for part in os.environ.get(self.variable, "").split(",") if (key := part.strip())]


def keyed_route(keys: Keys) -> type[APIRoute]:
    """Return a class of routes that check the key before they read the body."""

    class KeyedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_with_key(request: Request) -> Response:
                await _check_key(request, keys)
                return await handle(request)

            return handle_with_key

    return KeyedRoute


async def _check_key(request: Request, keys: Keys) -> None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip(" \t") if scheme.lower() == "bearer" else None
    try:  # without a file no thread: it would cost a tenth of a gateway's time
        accepted = await asyncio.to_thread(keys.accepts, given) if keys.file else keys.accepts(given)
    except (OSError, UnicodeDecodeError):
        raise UnavailableError("the keys cannot be read at the moment; try again later") from None
    if not accepted:
        raise HTTPException(401, "a key is required: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})
