"""What the HTTP interface asks of whatever recommends behind it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.serve.catalogue import Catalogue


@dataclass(frozen=True)
class Query:
    """One history to recommend for."""

    history: list[int | str]
    """In time order: item indices, or titles of items that the catalogue does not know. At least one."""
    k: int
    aggregation: str
    top_m: int
    exclude: IntArray
    """Items that must not come back, ascending."""
    allow: IntArray | None = None
    """Only these, unless None."""


@dataclass(frozen=True)
class Answer:
    """The K best items of a query."""

    items: ScoredItems
    encode_ms: float
    search_ms: float
    missing_shards: list[int] = field(default_factory=list)
    """Shards that did not answer, where a partial answer is allowed."""


class OverloadedError(Exception):
    """Too many requests wait; come again later."""


class UnavailableError(Exception):
    """A part that is needed is away; the message names it."""


class Served(Protocol):
    """One release: a model, an index made with it and their catalogue.

    Its methods raise OverloadedError or UnavailableError where they cannot answer at the moment.
    """

    version: str
    """What tells it from every other."""
    snapshot: str
    """Its index."""
    model: str
    """Its model."""
    catalogue: Catalogue
    top_m: int
    exclude_seen: bool
    """What a query gets that names none."""

    async def recommend(self, query: Query) -> Answer:
        """Answer one query."""
        ...

    async def beam_search(self, query: Query) -> Answer:
        """The same by writing titles, to compare with; `query.aggregation` and `query.top_m` mean nothing here."""
        ...

    def status(self) -> dict[str, Any]:
        """More about it, for people and monitors."""
        ...


class Engine(Protocol):
    """Recommends."""

    def current(self) -> Served:
        """The release that is served now. A request keeps the one it began with, so that no answer mixes two."""
        ...
