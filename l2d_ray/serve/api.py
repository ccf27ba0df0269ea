"""The HTTP application: FastAPI over an `Engine`, without Ray."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles

from l2d_ray.config import ServeConfig
from l2d_ray.serve.engine import Engine
from l2d_ray.serve.middleware import RequestLimits
from l2d_ray.serve.problems import PROBLEMS, add_error_handlers
from l2d_ray.serve.recommendations import RecommendationRoutes
from l2d_ray.serve.schemas import Item, ItemsResponse
from l2d_ray.serve.security import Keys, keyed_route

STATIC = Path(__file__).parent / "static"
DOCUMENTED_KEY = HTTPBearer(auto_error=False)
"""Declares the key in the OpenAPI description; `keyed_route` checks it."""


def create_app(engine: Engine, settings: ServeConfig, keys: Keys) -> FastAPI:
    """Return the application that answers by `engine`."""
    summary = "Recommend with a large language model without generating a token."
    app = FastAPI(title="l2d_ray", summary=summary, redirect_slashes=False, docs_url=None, redoc_url=None)
    v1 = APIRouter(
        prefix="/v1", route_class=keyed_route(keys), responses=PROBLEMS, dependencies=[Depends(DOCUMENTED_KEY)]
    )
    RecommendationRoutes(engine, settings).add_to(v1)
    _add_items(v1, engine, settings)
    _add_status(v1, engine)
    app.include_router(v1)
    _add_health(app)
    _add_pages(app)
    add_error_handlers(app)
    app.add_middleware(RequestLimits, max_body_bytes=settings.max_body_bytes, body_seconds=settings.deadline_seconds)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    return app


def _add_items(router: APIRouter, engine: Engine, settings: ServeConfig) -> None:
    threads = ThreadPoolExecutor(2)  # separate, so that long searches do not delay the other users of threads

    @router.get("/items", tags=["catalogue"])
    async def items(
        query: Annotated[
            str, Query(description="Words that the title must contain", max_length=settings.max_title_chars)
        ] = "",
        most: Annotated[int, Query(description="Number of items to return, at most", ge=1, le=100)] = 20,
    ) -> ItemsResponse:
        """Find items by words of their titles."""
        release = engine.current()
        catalogue = release.catalogue
        async with asyncio.timeout(settings.deadline_seconds):
            found = await asyncio.get_running_loop().run_in_executor(threads, catalogue.search, query, most)
        titled = [Item(item_id=catalogue.ids[index], title=catalogue.titles[index]) for index in found]
        return ItemsResponse(items=titled, version=release.version)


def _add_status(router: APIRouter, engine: Engine) -> None:
    @router.get("/status", tags=["operation"])
    async def status() -> dict[str, Any]:
        """Describe the release that is served."""
        release = engine.current()
        return {
            "version": release.version,
            "snapshot": release.snapshot,
            "model": release.model,
            "recommenders": release.recommenders,
            "aggregations": release.aggregations,
            **release.status(),
        }


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Confirm that the process answers."""
        return {"status": "ok"}


def _add_pages(app: FastAPI) -> None:
    """Add the page, the documentation and their files."""

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
