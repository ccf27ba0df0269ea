"""Error responses: every failed request is answered in JSON, as a `Problem`."""

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from l2d_ray.serve.engine import OverloadedError, UnavailableError
from l2d_ray.serve.schemas import Problem

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning}
    for status, meaning in {
        400: "The body is not valid JSON (malformed HTTP: 400 from HAProxy, in HTML)",
        401: "Missing or wrong key",
        408: "The body did not arrive in time (the request did not: 408 from HAProxy, in HTML)",
        413: "The body is too large",
        422: "The request is invalid; `errors` names the fields",
        503: "Overloaded, or a component is unavailable; see Retry-After",
        504: "The deadline passed",
    }.items()
}
"""The error responses of every route, for the OpenAPI description."""
MAX_ERRORS = 20
"""Invalid fields that one response lists."""
MAX_FIELD_CHARS = 200
"""Longest field name in a response: a client can send names of any length."""


class AsciiJSON(JSONResponse):
    """JSON in ASCII, because UTF-8 cannot encode the lone surrogates that a client may send."""

    def render(self, content: Any) -> bytes:
        """Return the encoded body."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


def problem(
    request: Request,
    status: int,
    detail: str,
    errors: Sequence[dict[str, str]] = (),
    headers: Any = None,
) -> JSONResponse:
    """Return an error response. `request` has an id already, from `RequestLimits`."""
    request_id = request.scope["state"]["request_id"]
    body = {"detail": detail, "request_id": request_id, "errors": list(errors)}
    # Starlette answers an unexpected error outside of RequestLimits, which would set these two headers.
    return AsciiJSON(body, status, {"X-Request-ID": request_id, "X-Content-Type-Options": "nosniff", **(headers or {})})


def invalid(location: tuple[str | int, ...], message: str) -> RequestValidationError:
    """Return the error of one field, as FastAPI's own validation raises it."""
    return RequestValidationError([{"loc": location, "msg": message}])


def _described(error: dict[str, Any]) -> dict[str, str]:
    """Return the field and the message of an error of pydantic."""
    if error.get("type") == "json_invalid":
        return {"field": "body", "message": "not JSON"}
    unknown, path = error.get("type") == "extra_forbidden", map(str, error["loc"])
    # pydantic also names the type that it tried, such as constrained-str or TitledItem, which no client knows.
    field = ".".join(part for part in path if unknown or re.fullmatch(r"[a-z_]+|\d+", part))
    return {"field": field[:MAX_FIELD_CHARS], "message": "unknown field" if unknown else error["msg"]}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception with a Problem.

    A response repeats nothing that the client sent, except field names and unknown item ids.
    """

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        # A misspelled field comes first: it explains why another one is missing.
        found = sorted(error.errors(), key=lambda one: one.get("type") != "extra_forbidden")
        errors = [_described(one) for one in found[:MAX_ERRORS]]
        return problem(request, 422, f"{errors[0]['field']}: {errors[0]['message']}", errors)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return problem(request, error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(TimeoutError)
    async def time_out(request: Request, error: TimeoutError) -> JSONResponse:
        return problem(request, 504, "the deadline passed")

    @app.exception_handler(OverloadedError)
    @app.exception_handler(UnavailableError)
    async def postpone(request: Request, error: Exception) -> JSONResponse:
        return problem(request, 503, str(error), headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return problem(request, 500, "internal error")
