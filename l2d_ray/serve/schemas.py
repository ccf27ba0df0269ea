"""Requests and responses of the HTTP interface. Limits that an operator sets are checked in api.py."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from l2d_ray.index.aggregations import AGGREGATIONS

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
"""One error is enough: a body of a megabyte could hold half a million."""


def _with_examples(*examples: dict[str, Any]) -> ConfigDict:
    return ConfigDict(use_attribute_docstrings=True, json_schema_extra={"examples": list(examples)})


def _known_aggregation(name: str) -> str:
    if name not in AGGREGATIONS:
        names = " or ".join(repr(known) for known in AGGREGATIONS)
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": names})
    return name


def _describe_aggregations(schema: dict[str, Any]) -> None:
    """Document the registered aggregations, whatever they are, as an enumeration."""
    described = "; ".join(f"`{name}`: {module.DESCRIPTION}" for name, module in AGGREGATIONS.items())
    schema.update(enum=list(AGGREGATIONS), description=f"How items are scored. {described}.")


class Body(BaseModel):
    """JSON that a client sends: closed to unknown fields, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TitledItem(Body):
    """An item that the catalogue need not know: its title is text to the model."""

    title: str = Field(min_length=1)


class RecommendRequest(Body):
    """A history, and what to recommend after it."""

    model_config = _with_examples(*REQUESTS)

    history: Annotated[list[Annotated[str, Field(min_length=1)] | TitledItem], FailFast()] = Field(min_length=1)
    """What the user chose, in time order: item ids, or titles of items that the catalogue does not know."""
    k: int = Field(20, ge=1, le=10_000)
    """Items to recommend: at most 100, where the operator does not say otherwise."""
    aggregation: Annotated[str, AfterValidator(_known_aggregation)] = Field(
        "global", json_schema_extra=_describe_aggregations
    )
    top_m: int | None = Field(None, ge=1, le=10_000)
    """L2D-L: how many sequences. None: the server's setting."""
    exclude_seen: bool | None = None
    """Do not recommend what is in the history. None: the server's setting, most often true."""
    deny: ItemIds = []
    """Item ids that are not to be recommended. Unknown ones are ignored."""
    allow: ItemIds | None = None
    """Recommend only these item ids. Unknown ones are ignored."""
    unknown_items: Literal["refuse", "skip"] = "refuse"
    """What to do with item ids in the history that the catalogue does not know: answer 422, or leave them out."""


class Recommendation(BaseModel):
    """One item."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    item_id: str
    title: str
    score: float | None
    """1 / distance, of L2D-G with what the item's prior adds to it; null where that is zero. Of beam search: the
    log-probability of the title."""


class Timing(BaseModel):
    """Milliseconds."""

    encode: float
    search: float
    total: float


class RecommendResponse(BaseModel):
    """The best items first."""

    model_config = _with_examples(RESPONSE)

    items: list[Recommendation]
    version: str
    """Of what is served: model, index and settings. All of an answer is of one version."""
    snapshot: str
    """Which memory and index answered."""
    model: str
    """Which model read the history."""
    timing_ms: Timing
    skipped: list[str] = []
    """Item ids of the history that the catalogue does not know, where `unknown_items` is `skip`."""
    partial: bool = False
    """Whether shards were missing, where the operator allows an answer without them."""
    missing_shards: list[int] = []


class BatchRequest(Body):
    """Several requests at once."""

    model_config = _with_examples({"requests": REQUESTS})

    requests: Annotated[list[RecommendRequest], FailFast()] = Field(min_length=1)


class BatchResponse(BaseModel):
    """The responses in the order of the requests."""

    model_config = _with_examples({"responses": [RESPONSE, RESPONSE]})

    responses: list[RecommendResponse]


class Item(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str


class ItemsResponse(BaseModel):
    """Items whose titles match."""

    model_config = _with_examples(
        {"items": [{"item_id": "50", "title": "Star Wars (1977)"}], "version": RESPONSE["version"]}
    )

    items: list[Item]
    version: str
    """As in a recommendation."""


class Problem(BaseModel):
    """What is wrong, in words; `errors` names the fields where it is a request's."""

    model_config = _with_examples(
        {
            "detail": "body.history: unknown items: 9999",
            "request_id": "0d6f1c3e5a7b4920",
            "errors": [{"field": "body.history", "message": "unknown items: 9999"}],
        }
    )

    detail: str
    request_id: str
    errors: list[dict[str, str]] = []
