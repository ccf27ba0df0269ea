"""Routes that recommend: after one history, after several, and by constrained beam search."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter

from l2d_ray.config import ServeConfig
from l2d_ray.core.query import Query
from l2d_ray.serve.engine import Answer, Engine, OverloadedError, ServedRelease
from l2d_ray.serve.recommenders import L2D
from l2d_ray.serve.schemas import BatchRequest, BatchResponse, RecommendRequest, RecommendResponse
from l2d_ray.serve.translation import Location, check_limit, query_of, response_of

logger = logging.getLogger("ray.serve")  # Ray Serve writes this logger's records as JSON lines


class RecommendationRoutes:
    """The routes, as methods. FastAPI publishes their docstrings as the descriptions of the operations."""

    def __init__(self, engine: Engine, settings: ServeConfig) -> None:
        """Answer by `engine` within the limits of `settings`."""
        self._engine, self._settings = engine, settings

    def add_to(self, router: APIRouter) -> None:
        """Add the routes to a router; beam search only if `serve.beams` offers it."""
        router.post("/recommend", tags=["recommend"], response_model_exclude_unset=True)(self.recommend)
        router.post("/recommend/batch", tags=["recommend"], response_model_exclude_unset=True)(self.recommend_batch)
        if self._settings.beams:
            router.post("/beam_search", tags=["recommend"], response_model_exclude_unset=True)(self.beam_search)

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Recommend items after one history."""
        release = self._engine.current()
        async with asyncio.timeout(self._settings.deadline_seconds):
            response = await self._respond(release.recommend, release, request)
        self._log("recommend", [request], [response])
        return response

    async def recommend_batch(self, batch: BatchRequest) -> BatchResponse:
        """Recommend items after each of several histories. One invalid request refuses the whole batch."""
        settings, at_requests = self._settings, ("body", "requests")
        check_limit(len(batch.requests), settings.max_batch, at_requests, "requests", "serve.max_batch")
        release = self._engine.current()
        try:
            async with asyncio.timeout(settings.deadline_seconds), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._respond(release.recommend, release, request, (*at_requests, number)))
                    for number, request in enumerate(batch.requests)
                ]
        except ExceptionGroup as failures:
            failure = failures.exceptions[0]
            if isinstance(failure, OverloadedError) and len(tasks) > 1:  # they may have waited for each other only
                raise OverloadedError(f"{failure}, or send fewer histories at once") from None
            raise failure from None
        responses = [task.result() for task in tasks]
        self._log("recommend", batch.requests, responses)
        return BatchResponse(responses=responses)

    async def beam_search(self, request: RecommendRequest) -> RecommendResponse:
        """Recommend items by constrained beam search, for comparison with L2D. Takes seconds.

        Finds about as many items as it has beams. Ignores `recommender`, `aggregation` and `top_m`.
        """
        release = self._engine.current()
        async with asyncio.timeout(self._settings.beam_seconds):
            ignored = {"recommender": L2D, "aggregation": next(iter(release.aggregations))}
            chosen = request.model_copy(update=ignored)
            response = await self._respond(lambda query, _: release.beam_search(query), release, chosen)
        self._log("beam_search", [request], [response])
        return response

    async def _respond(
        self,
        answer: Callable[[Query, str], Awaitable[Answer]],
        release: ServedRelease,
        request: RecommendRequest,
        location: Location = ("body",),
    ) -> RecommendResponse:
        started = time.perf_counter()
        query, skipped = query_of(request, location, release, self._settings)
        found = await answer(query, request.recommender)
        return response_of(found, release, skipped, time.perf_counter() - started)

    def _log(self, method: str, requests: Sequence[RecommendRequest], responses: Sequence[RecommendResponse]) -> None:
        if self._settings.log_histories:
            for request, response in zip(requests, responses, strict=True):
                logger.info(
                    method, extra={"request": request.model_dump(), "response": response.model_dump(exclude_unset=True)}
                )
