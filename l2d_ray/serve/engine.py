"""What the HTTP interface asks of whatever recommends behind it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from l2d_ray.core.decoding import Aggregation, IntArray, ScoredItems


@dataclass(frozen=True)
class Query:
    """One history to recommend for."""

    history: list[int | str]
    """In time order: item indices, or titles of items that the catalogue does not know. At least one."""
    k: int
    aggregation: Aggregation
    top_m: int
    exclude: IntArray
    """Items that must not come back, ascending."""
    allow: IntArray | None = None
    """Only these, unless None."""


@dataclass(frozen=True)
class Answer:
    """The K best items of a query."""

    items: ScoredItems
    snapshot: str
    """Which index answered."""
    model: str
    """Which model read the history."""
    encode_ms: float
    search_ms: float
    missing_shards: list[int] = field(default_factory=list)
    """Shards that did not answer, where a partial answer is allowed."""


class OverloadedError(Exception):
    """Too many requests wait; come again later."""


class UnavailableError(Exception):
    """A part that is needed is away; the message names it."""


class Engine(Protocol):
    """Recommends. Raises OverloadedError or UnavailableError where it cannot at the moment."""

    async def recommend(self, query: Query) -> Answer:
        """Answer one query."""
        ...

    async def status(self) -> dict[str, Any]:
        """What is served, and by how many; for people and monitors."""
        ...
