"""Translation between HTTP bodies, which name items by id, and queries, which name them by index."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.query import Query
from l2d_ray.index.aggregations import l2d_posterior
from l2d_ray.serve.catalogue import ItemCatalogue
from l2d_ray.serve.engine import Answer, ServedRelease
from l2d_ray.serve.problems import invalid
from l2d_ray.serve.recommenders import L2D
from l2d_ray.serve.schemas import Recommendation, RecommendRequest, RecommendResponse, Timing

Location = tuple[str | int, ...]
"""Path of a field in a request, as in `RequestValidationError`."""


def query_of(
    request: RecommendRequest, location: Location, release: ServedRelease, settings: ServeConfig
) -> tuple[Query, list[str]]:
    """Return the query of a request, and the unknown item ids that were left out of its history.

    `location` is the path of the request in the body. Raises RequestValidationError, naming the field, if a limit of
    `settings` is exceeded, if the recommender is not served, the index does not offer the aggregation or it cannot be
    explained, if an unknown item is to be refused, or if no known item is left.
    """
    _check_sizes(request, location, settings)
    if request.recommender not in release.recommenders:
        served = ", ".join(release.recommenders)
        raise invalid((*location, "recommender"), f"not served; give one of {served} (serve.recommender)")
    if request.recommender == L2D and request.aggregation not in release.aggregations:
        raise invalid((*location, "aggregation"), f"not offered by this index; use {' or '.join(release.aggregations)}")
    if request.explain and (request.recommender, request.aggregation) != (L2D, l2d_posterior.NAME):
        reason = f"explains only the scores of l2d with aggregation={l2d_posterior.NAME}; give these, or leave it out"
        raise invalid((*location, "explain"), reason)
    catalogue, at_history = release.catalogue, (*location, "history")
    unknown = catalogue.unknown(item for item in request.history if isinstance(item, str))
    if unknown and request.unknown_items == "refuse":
        raise invalid(
            at_history,
            f"unknown items: {', '.join(item[:100] for item in unknown[:10])}; add unknown_items=skip to leave such"
            ' items out, or give {"title": …} in place of an id',
        )
    history = [catalogue.index(item) if isinstance(item, str) else item.title for item in request.history]
    known = [item for item in history if item is not None]
    if not known:
        raise invalid(at_history, "contains no item that the catalogue knows")
    query = Query.after(
        known,
        k=request.k,
        exclude_seen=release.exclude_seen if request.exclude_seen is None else request.exclude_seen,
        deny=_indices(request.deny, catalogue),
        allow=None if request.allow is None else _indices(request.allow, catalogue),
        aggregation=request.aggregation,
        top_m=request.top_m or release.top_m,
        explain=request.explain,
    )
    return query, unknown


def response_of(answer: Answer, release: ServedRelease, skipped: list[str], seconds: float) -> RecommendResponse:
    """Return the response to a request that took `seconds` and whose unknown items were `skipped`."""
    return RecommendResponse(
        items=_recommendations(answer, release.catalogue),
        version=release.version,
        snapshot=release.snapshot,
        model=answer.model or release.model,
        timing_ms=Timing(
            encode=round(answer.encode_ms, 3), search=round(answer.search_ms, 3), total=round(1000 * seconds, 3)
        ),
        skipped=skipped,
        partial=bool(answer.missing_shards),
        missing_shards=answer.missing_shards,
    )


def _recommendations(answer: Answer, catalogue: ItemCatalogue) -> list[Recommendation]:
    """Return the items of an answer. Fields that do not apply to it stay unset."""
    found = []
    for number, (item, score) in enumerate(zip(answer.items.items_I, answer.items.scores_I.tolist(), strict=True)):
        more: dict[str, Any] = {}
        if answer.log_probabilities:
            more["probability"] = math.exp(score)
        if answer.explanations is not None:
            more["explanation"] = answer.explanations[number]
        shown = score if math.isfinite(score) else None
        found.append(Recommendation(item_id=catalogue.ids[item], title=catalogue.titles[item], score=shown, **more))
    return found


def check_limit(count: int, limit: int, location: Location, unit: str, setting: str) -> None:
    """Raise RequestValidationError if a request exceeds the limit of a setting."""
    if count > limit:
        raise invalid(location, f"{count} {unit}, at most {limit} are allowed ({setting})")


def _check_sizes(request: RecommendRequest, location: Location, settings: ServeConfig) -> None:
    check_limit(len(request.history), settings.max_history, (*location, "history"), "items", "serve.max_history")
    check_limit(request.k, settings.max_k, (*location, "k"), "items", "serve.max_k")
    for field, ids in (("deny", request.deny), ("allow", request.allow or [])):
        check_limit(len(ids), settings.max_filter_items, (*location, field), "items", "serve.max_filter_items")
    for position, item in enumerate(request.history):
        if not isinstance(item, str):
            title = (*location, "history", position, "title")
            check_limit(len(item.title), settings.max_title_chars, title, "characters", "serve.max_title_chars")


def _indices(item_ids: Sequence[str], catalogue: ItemCatalogue) -> IntArray:
    """Return the indices of the known items, ascending, each once."""
    found = {index for item_id in item_ids if (index := catalogue.index(item_id)) is not None}
    return np.array(sorted(found), np.int64)
