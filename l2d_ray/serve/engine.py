"""The interface between the HTTP application and the recommender behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.serve.catalogue import ItemCatalogue
from l2d_ray.serve.recommenders import L2D
from l2d_ray.serve.schemas import Explanation


@dataclass(frozen=True)
class Answer:
    """The best items of a query, at most `query.k`."""

    items: ScoredItems
    encode_ms: float
    """Milliseconds until the history's hidden state was known, including the wait for a batch."""
    search_ms: float
    """Milliseconds of the search."""
    missing_shards: list[int] = field(default_factory=list)
    """Shards that did not answer, where partial answers are allowed."""
    model: str | None = None
    """Identifier of what answered, if that is not the model of the release."""
    log_probabilities: bool = False
    """Whether scores are natural logarithms of probabilities, which add up to 1 over the catalogue."""
    explanations: Sequence[Explanation | None] | None = None
    """For each item, if the query asks for explanations. None where a shard did not answer."""


class OverloadedError(Exception):
    """Too many requests are waiting; the client may try again later."""


class UnavailableError(Exception):
    """A required component is unavailable; the message names it."""


class ServedRelease(Protocol):
    """A release that answers queries: a model, an index made with it, their catalogue, and other recommenders.

    Its methods raise OverloadedError or UnavailableError if they cannot answer at the moment.
    """

    version: str
    """Identifier of the release."""
    snapshot: str
    """Identifier of its index."""
    model: str
    """Identifier of its model."""
    aggregations: dict[str, str]
    """Names and descriptions of the aggregations that the index offers."""
    catalogue: ItemCatalogue
    top_m: int
    """M of L2D-L for requests that do not set it."""
    exclude_seen: bool
    """Whether items of the history are excluded, for requests that do not say."""

    @property
    def recommenders(self) -> Mapping[str, str]:
        """Identifier of what answers, by the name of the recommender: first L2D, with the model, then others."""
        ...

    async def recommend(self, query: Query, recommender: str = L2D) -> Answer:
        """Answer one query by L2D, or by another one of `recommenders`, which ignores `aggregation` and `top_m`."""
        ...

    async def beam_search(self, query: Query) -> Answer:
        """Answer one query by constrained beam search, for comparison. Ignores `aggregation` and `top_m`."""
        ...

    def status(self) -> dict[str, Any]:
        """Return further facts about the release for people and monitors."""
        ...


class Engine(Protocol):
    """A recommender that serves one release at a time."""

    def current(self) -> ServedRelease:
        """Return the release that is served now. A request keeps it to its end, so that no answer mixes two."""
        ...
