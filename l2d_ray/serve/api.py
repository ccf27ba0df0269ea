"""The HTTP interface: FastAPI over an `Engine`, without Ray."""

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import IntArray
from l2d_ray.serve import engine as engines
from l2d_ray.serve.catalogue import Catalogue
from l2d_ray.serve.engine import Answer, Engine, OverloadedError, Served, UnavailableError
from l2d_ray.serve.schemas import (
    BatchRequest,
    BatchResponse,
    Item,
    ItemsResponse,
    Problem,
    Recommendation,
    RecommendRequest,
    RecommendResponse,
    Timing,
)
from l2d_ray.serve.security import Keys

KEYS_VARIABLE = "L2D_RAY_KEYS"
logger = logging.getLogger("ray.serve")  # what it gets becomes JSON lines, once Ray Serve runs this
STATIC = Path(__file__).parent / "static"
BEARER = HTTPBearer(auto_error=False)
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning}
    for status, meaning in {
        400: "Body cannot be read as JSON (what is no HTTP gets another 400, from HAProxy)",
        401: "Missing or wrong key",
        408: "The body did not come in time (or, from HAProxy, the request)",
        413: "Body too large",
        422: "Bad request; `errors` names the fields",
        503: "Overloaded or a part is away; see Retry-After",
        504: "Deadline exceeded",
    }.items()
}


def create_app(engine: Engine, settings: ServeConfig, keys: Keys) -> FastAPI:
    """The application."""
    summary = "Recommend with a large language model without generating a token."
    app = FastAPI(title="l2d_ray", summary=summary, redirect_slashes=False, docs_url=None, redoc_url=None)
    searches = ThreadPoolExecutor(2)  # of their own: long ones must not delay what else has threads do
    v1 = APIRouter(
        prefix="/v1", route_class=_asking_for(keys), responses=PROBLEMS, dependencies=[Depends(BEARER)]
    )  # the dependency is for the documentation

    async def respond(
        ask: Callable[[engines.Query], Awaitable[Answer]],
        served: Served,
        request: RecommendRequest,
        where: tuple[str | int, ...] = ("body",),
    ) -> RecommendResponse:
        started = time.perf_counter()
        query, skipped = _query(request, where, served, settings)
        answer = await ask(query)
        return _response(answer, served, skipped, time.perf_counter() - started)

    def log(method: str, requests: Sequence[RecommendRequest], responses: Sequence[RecommendResponse]) -> None:
        if settings.log_histories:
            for request, response in zip(requests, responses, strict=True):
                logger.info(method, extra={"request": request.model_dump(), "response": response.model_dump()})

    @v1.post("/recommend", tags=["recommend"])
    async def recommend(request: RecommendRequest) -> RecommendResponse:
        """What to recommend after one history."""
        served = engine.current()
        async with asyncio.timeout(settings.deadline_seconds):
            response = await respond(served.recommend, served, request)
        log("recommend", [request], [response])
        return response

    @v1.post("/recommend/batch", tags=["recommend"])
    async def recommend_batch(batch: BatchRequest) -> BatchResponse:
        """The same for several histories; one that is bad refuses them all."""
        _at_most(len(batch.requests), settings.max_batch, ("body", "requests"), "requests", "serve.max_batch")
        served = engine.current()
        try:
            async with asyncio.timeout(settings.deadline_seconds), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(respond(served.recommend, served, one, ("body", "requests", number)))
                    for number, one in enumerate(batch.requests)
                ]
        except ExceptionGroup as failures:
            failure = failures.exceptions[0]
            if isinstance(failure, OverloadedError) and len(tasks) > 1:  # they may have waited for one another only
                raise OverloadedError(f"{failure}, or send fewer histories at once") from None
            raise failure from None
        responses = [task.result() for task in tasks]
        log("recommend", batch.requests, responses)
        return BatchResponse(responses=responses)

    if settings.beams:

        @v1.post("/beam_search", tags=["recommend"])
        async def beam_search(request: RecommendRequest) -> RecommendResponse:
            """What constrained beam search writes after the same history, to compare with; it takes seconds.

            It finds about as many items as it has beams. `aggregation` and `top_m` mean nothing to it.
            """
            served = engine.current()
            async with asyncio.timeout(settings.beam_seconds):
                response = await respond(served.beam_search, served, request)
            log("beam_search", [request], [response])
            return response

    @v1.get("/items", tags=["catalogue"])
    async def items(
        query: Annotated[
            str, Query(description="Words that the title holds", max_length=settings.max_title_chars)
        ] = "",
        most: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> ItemsResponse:
        """Items by words of their titles."""
        served = engine.current()
        catalogue = served.catalogue
        async with asyncio.timeout(settings.deadline_seconds):
            found = await asyncio.get_running_loop().run_in_executor(searches, catalogue.search, query, most)
        titled = [Item(item_id=catalogue.ids[n], title=catalogue.titles[n]) for n in found]
        return ItemsResponse(items=titled, version=served.version)

    @v1.get("/status", tags=["operation"])
    async def status() -> dict[str, Any]:
        """What is served."""
        served = engine.current()
        return {"version": served.version, "snapshot": served.snapshot, "model": served.model, **served.status()}

    app.include_router(v1)

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Answers while the process does."""
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="l2d_ray",
            swagger_js_url="static/swagger-ui-bundle.js",
            swagger_css_url="static/swagger-ui.css",
            swagger_favicon_url="data:,",
        )

    app.mount("/static", StaticFiles(directory=STATIC, packages=[("fastapi_offline", "static")]), name="static")
    _handle_errors(app)
    app.add_middleware(Envelope, max_body_bytes=settings.max_body_bytes, body_seconds=settings.deadline_seconds)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    return app


def _asking_for(keys: Keys) -> type[APIRoute]:
    """Routes that look at the key before they read the body."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                scheme, _, key = request.headers.get("authorization", "").partition(" ")
                given = key.strip(" \t") if scheme.lower() == "bearer" else None
                try:  # a thread for the file only: it takes a tenth of a gateway's time
                    accepted = await asyncio.to_thread(keys.accepts, given) if keys.file else keys.accepts(given)
                except (OSError, UnicodeDecodeError):
                    raise UnavailableError("the keys cannot be read at the moment; come again later") from None
                if not accepted:
                    raise HTTPException(401, "a key is needed: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})
                return await handle(request)

            return guarded

    return Guarded


def _query(
    request: RecommendRequest, where: tuple[str | int, ...], served: Served, settings: ServeConfig
) -> tuple[engines.Query, list[str]]:
    """The query of a request, and the item ids that were left out of its history."""
    at, catalogue = (*where, "history"), served.catalogue
    _at_most(len(request.history), settings.max_history, at, "items", "serve.max_history")
    _at_most(request.k, settings.max_k, (*where, "k"), "items", "serve.max_k")
    for name, ids in (("deny", request.deny), ("allow", request.allow or [])):
        _at_most(len(ids), settings.max_filter_items, (*where, name), "items", "serve.max_filter_items")
    history: list[int | str] = []
    for number, item in enumerate(request.history):
        if isinstance(item, str):
            index = catalogue.index(item)
            history += [] if index is None else [index]
        else:
            title = (*at, number, "title")
            _at_most(len(item.title), settings.max_title_chars, title, "characters", "serve.max_title_chars")
            history.append(item.title)
    unknown = catalogue.unknown(item for item in request.history if isinstance(item, str))
    if unknown and request.unknown_items == "refuse":
        raise _invalid(at, f"unknown items: {', '.join(item[:100] for item in unknown[:10])}")
    if not history:
        raise _invalid(at, "holds no item that the catalogue knows")
    exclude_seen = served.exclude_seen if request.exclude_seen is None else request.exclude_seen
    seen = [item for item in history if isinstance(item, int)] if exclude_seen else []
    return engines.Query(
        history=history,
        k=request.k,
        aggregation=request.aggregation,
        top_m=request.top_m or served.top_m,
        exclude=np.union1d(np.array(seen, np.int64), _indices(request.deny, catalogue)),
        allow=None if request.allow is None else _indices(request.allow, catalogue),
    ), unknown


def _indices(item_ids: Sequence[str], catalogue: Catalogue) -> IntArray:
    found = {index for item_id in item_ids if (index := catalogue.index(item_id)) is not None}
    return np.array(sorted(found), np.int64)


def _response(answer: Answer, served: Served, skipped: list[str], seconds: float) -> RecommendResponse:
    catalogue = served.catalogue
    found = zip(answer.items.items_I.tolist(), answer.items.scores_I.tolist(), strict=True)
    return RecommendResponse(
        items=[
            Recommendation(
                item_id=catalogue.ids[item],
                title=catalogue.titles[item],
                score=score if math.isfinite(score) else None,
            )
            for item, score in found
        ],
        version=served.version,
        snapshot=served.snapshot,
        model=served.model,
        timing_ms=Timing(
            encode=round(answer.encode_ms, 3), search=round(answer.search_ms, 3), total=round(1000 * seconds, 3)
        ),
        skipped=skipped,
        partial=bool(answer.missing_shards),
        missing_shards=answer.missing_shards,
    )


def _at_most(count: int, most: int, where: tuple[str | int, ...], things: str, setting: str) -> None:
    if count > most:
        raise _invalid(where, f"{count} {things}, at most {most} are allowed ({setting})")


def _invalid(where: tuple[str | int, ...], message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": where, "msg": message}])


def _handle_errors(app: FastAPI) -> None:
    """Every error is a Problem. Nothing that a client sent is given back but field names and unknown item ids."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            {"field": ".".join(str(part) for part in one["loc"])[:200], "message": one["msg"]}
            for one in error.errors()[:20]
        ]
        return problem(request, 422, f"{errors[0]['field']}: {errors[0]['message']}", errors)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem(request, error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> JSONResponse:
        return problem(request, 504, "the deadline passed")

    @app.exception_handler(OverloadedError)
    @app.exception_handler(UnavailableError)
    async def unavailable(request: Request, error: Exception) -> JSONResponse:
        return problem(request, 503, str(error), headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return problem(request, 500, "internal error")


def problem(
    request: Request,
    status: int,
    detail: str,
    errors: Sequence[dict[str, str]] = (),
    headers: Any = None,
) -> JSONResponse:
    """An error as every client gets it. The request has its id, from `Envelope`."""
    request_id = request.scope["state"]["request_id"]
    body = {"detail": detail, "request_id": request_id, "errors": list(errors)}
    # Starlette answers an unexpected error outside of Envelope.
    return AsciiJSON(body, status, {"X-Request-ID": request_id, "X-Content-Type-Options": "nosniff", **(headers or {})})


class AsciiJSON(JSONResponse):
    """JSON in ASCII: a client's lone surrogates cannot be written in UTF-8."""

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def request_id_of(scope: Scope) -> str:
    """The id that a client gave its request, if it is a good one; else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def with_headers(send: Send, own: dict[bytes, bytes]) -> Send:
    """`send`, whose responses have these headers, once each."""

    async def with_own(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", []) if pair[0] not in own]
            message = {**message, "headers": [*kept, *own.items()]}
        await send(message)

    return with_own


class Envelope:
    """Around every request: its id, and the limits of its body."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_seconds: float) -> None:
        """`app` sees at most so many bytes of a body, which must come in so many seconds."""
        self._app, self._max_body_bytes, self._body_seconds = app, max_body_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 to a larger body, as soon as it is known to be, and 408 to one that does not come."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        numbered = with_headers(send, {b"x-request-id": request_id.encode(), b"x-content-type-options": b"nosniff"})
        too_large = f"the body is larger than {self._max_body_bytes} bytes (serve.max_body_bytes)"
        body, more = 0, True
        deadline = asyncio.get_running_loop().time() + self._body_seconds

        async def counted() -> Message:
            nonlocal body, more
            try:
                async with asyncio.timeout_at(deadline if more else None):  # afterwards: until the client goes
                    message = await receive()
            except TimeoutError:
                late = "the body did not come in time (serve.deadline_seconds)"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            body, more = body + len(message.get("body", b"")), message.get("more_body", False)
            if body > self._max_body_bytes:
                raise HTTPException(413, too_large)
            return message

        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body_bytes:
            await problem(Request(scope), 413, too_large)(scope, receive, numbered)
        else:
            await self._app(scope, counted, numbered)
