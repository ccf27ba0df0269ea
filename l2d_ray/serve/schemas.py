"""Bodies of the requests and responses. Limits that an operator sets are checked in translation.py."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field
from typing_extensions import TypeAliasType

from l2d_ray.index.aggregations import AGGREGATIONS
from l2d_ray.serve.recommenders import L2D

if TYPE_CHECKING:
    AggregationName = str
else:
    AggregationName = Literal[tuple(AGGREGATIONS)]
REQUESTS: list[dict[str, Any]] = [
    {"history": ["50", "172", "181"], "k": 10},
    {"history": ["50", {"title": "Blade Runner 2049 (2017)"}], "aggregation": "local", "deny": ["172"]},
]
RESPONSE = {
    "items": [{"item_id": "174", "title": "Raiders of the Lost Ark (1981)", "score": 0.0412}],
    "version": "5b0c2f7d9e14",
    "snapshot": "1-8f2c61d0",
    "model": "2a6d90c4e1b7+c07e5d18f3a9",
    "timing_ms": {"encode": 14.2, "search": 1.8, "total": 16.9},
    "skipped": [],
    "partial": False,
    "missing_shards": [],
}
ItemIds = TypeAliasType("ItemIds", Annotated[list[str], FailFast()])
"""Item ids; validation stops at the first error, because a body of 1 MB could hold half a million."""


def _with_examples(*examples: dict[str, Any]) -> ConfigDict:
    return ConfigDict(use_attribute_docstrings=True, json_schema_extra={"examples": list(examples)})


class Body(BaseModel):
    """JSON from a client. Unknown fields are refused; strings are not converted to numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TitledItem(Body):
    """An item given by its title, which the model reads as text. The catalogue need not know it."""

    title: str = Field(min_length=1)


class RecommendRequest(Body):
    """A history, and which items to recommend after it."""

    model_config = _with_examples(*REQUESTS)

    history: Annotated[list[Annotated[str, Field(min_length=1)] | TitledItem], FailFast()] = Field(min_length=1)
    """The user's items in time order: item ids, or titles of items that the catalogue does not know."""
    k: int = Field(20, ge=1, le=10_000)
    """Number of items to recommend: at most 100, unless the operator sets another limit."""
    recommender: str = Field(L2D, min_length=1)
    """Name of the recommender that answers; /v1/status lists them. All but `l2d` ignore `aggregation` and `top_m`."""
    aggregation: AggregationName = Field(
        "global",
        description="How items are scored. "
        + "; ".join(f"`{name}`: {module.DESCRIPTION}" for name, module in AGGREGATIONS.items()),
    )
    top_m: int | None = Field(None, ge=1, le=10_000)
    """L2D-L: number of nearest training sequences. null: the server's setting."""
    exclude_seen: bool | None = None
    """Whether to leave out items of the history. null: the server's setting, by default true."""
    deny: ItemIds = []
    """Item ids to leave out. Unknown ids are ignored."""
    allow: ItemIds | None = None
    """The only item ids to recommend. Unknown ids are ignored. null: all items."""
    unknown_items: Literal["refuse", "skip"] = "refuse"
    """Treatment of item ids in the history that the catalogue does not know: answer 422, or skip them."""
    explain: bool = False
    """Whether to explain each item, which takes some milliseconds more. Only for `aggregation: posterior` of L2D."""


class PastItem(BaseModel):
    """An item of the history, and how much it says about a recommended item."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    item_id: str
    title: str
    share: float
    """Share of the recommended item's probability, given the last items alone, that comes from this item."""


class Explanation(BaseModel):
    """The reasons for the score of an item."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    terms: dict[str, float]
    """Terms in nats, which add up to the score. `state`: the model's state after the history is near the sequences that
    the item followed; `title` if it followed none. `transitions`: the item followed the last items more often than
    others. `popularity`: logarithm of its share of all sequences. `repetition`: it is in the history.
    `normalisation`: the same for all items."""
    after: list[PastItem]
    """Last items of the history that the item often followed, the largest share first."""
    sequences: list[list[str]]
    """Titles of the training sequences that the item followed and that are nearest to the history."""


class Recommendation(BaseModel):
    """A recommended item."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    item_id: str
    title: str
    score: float | None
    """L2D-G and L2D-L: 1 / distance between history and item; in L2D-G the distance includes the item's prior. null:
    the distance is zero. `posterior`: natural logarithm of the probability. Beam search: that of the title. Another
    recommender: its own score."""
    probability: float | None = None
    """Probability that this item comes next, among all items of the catalogue. Only for `posterior` and for fusions."""
    explanation: Explanation | None = None
    """Only if the request has `explain`."""


class Timing(BaseModel):
    """Durations in milliseconds."""

    encode: float
    search: float
    total: float


class RecommendResponse(BaseModel):
    """Recommended items, best first."""

    model_config = _with_examples(RESPONSE)

    items: list[Recommendation]
    version: str
    """Version of the release (model, index and settings) that answered. One response never mixes two."""
    snapshot: str
    """Identifier of the memory snapshot and index that answered."""
    model: str
    """Identifier of the model that read the history; of another recommender than L2D, its name and its weights."""
    timing_ms: Timing
    skipped: list[str] = []
    """Item ids of the history that were skipped (`unknown_items`)."""
    partial: bool = False
    """Whether shards of the index were missing. Only if the operator allows partial answers."""
    missing_shards: list[int] = []
    """Numbers of the missing shards."""


class BatchRequest(Body):
    """Several requests."""

    model_config = _with_examples({"requests": REQUESTS})

    requests: Annotated[list[RecommendRequest], FailFast()] = Field(min_length=1)


class BatchResponse(BaseModel):
    """Responses in the order of the requests."""

    model_config = _with_examples({"responses": [RESPONSE, RESPONSE]})

    responses: list[RecommendResponse]


class Item(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str


class ItemsResponse(BaseModel):
    """Items whose titles match a query."""

    model_config = _with_examples(
        {"items": [{"item_id": "50", "title": "Star Wars (1977)"}], "version": RESPONSE["version"]}
    )

    items: list[Item]
    version: str
    """Version of the release that answered."""


_UNKNOWN = "unknown items: 9999; add unknown_items=skip to leave such items out, or give their titles"


class Problem(BaseModel):
    """An error: what is wrong, in words. `errors` names the invalid fields of a request."""

    model_config = _with_examples(
        {
            "detail": f"body.history: {_UNKNOWN}",
            "request_id": "0d6f1c3e5a7b4920",
            "errors": [{"field": "body.history", "message": _UNKNOWN}],
        }
    )

    detail: str
    request_id: str
    """The X-Request-ID of the request, or an id made for it."""
    errors: list[dict[str, str]] = []
