"""What both HTTP APIs share: strict bodies that are documented as they are read, and errors in one form."""

from __future__ import annotations

import asyncio
import json
import logging
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from genmodels import __version__
from genmodels.engine.requests import validation_error
from genmodels.errors import (
    CheckpointError,
    DamagedObject,
    GenmodelsError,
    IdempotencyConflict,
    JobNotFound,
    KeyNotFound,
    RequestError,
    SpecError,
    StorageError,
    StorageUnavailable,
)
from genmodels.schema.field_errors import show
from services.http.docs import HEADERS, page
from services.http.middleware import MAX_BODY, IngressMiddleware, StreamedRoute
from services.http.request_metrics import COUNT, tag_version
from services.http.responses import Json, error_response
from services.http.semantics import Head, PlainBodies

JSON = ("application/json",)
MAX_NESTED = 2**18  # lists, objects and keys of a body: 64 pictures of 256 rows in 3 colours have 50,000 lists

logger = logging.getLogger("genmodels.api")

BodyT = TypeVar("BodyT", bound=BaseModel)
T = TypeVar("T")


async def _well() -> str | None:
    return None


def new_app(
    title: str,
    description: str,
    *,
    hosts: Collection[str] | None,
    max_body: int = MAX_BODY,
    streamed: StreamedRoute | None = None,
    max_requests: int | None = None,
    schemas: Callable[[], Mapping[str, Any]] = dict,
    health: Callable[[], Awaitable[str | None]] = _well,
) -> FastAPI:
    """An application behind an Edge, with `/openapi.json` and a readable page of it at `/docs`.

    Args:
        hosts, max_body, streamed, max_requests: the Edge's.
        schemas: more of OpenAPI's `components.schemas`, called when the document is first asked for.
        health: says why the service is not well, though it answers; None: it is.
    """
    app = FastAPI(
        title=title,
        version=__version__,
        description=description,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Head)
    app.add_middleware(PlainBodies)
    app.add_middleware(IngressMiddleware, hosts=hosts, max_body=max_body, streamed=streamed, max_requests=max_requests)
    for kind in (GenmodelsError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _on_error)
    app.openapi = lambda: _openapi(app, schemas)  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return HTMLResponse(page(app.openapi()), headers=HEADERS)

    @app.get("/healthz")
    async def healthz() -> Response:
        """Answer 200 while the process and its background threads make progress, else 503 with the reason."""
        if problem := await health():
            return error_response(503, problem, code="stalled", headers={"retry-after": "10"})
        return Json({"status": "ok"})

    return app


async def read_body(kind: type[BodyT], request: Request, *, optional: bool = False) -> BodyT:
    """A request's JSON body as `kind`, strictly, with errors that name the field.

    Args:
        optional: nothing at all stands for `{}`.
    """
    body = await request.body()
    if optional and not body:
        return kind()
    check_content_type(request, JSON)
    _check_nested(body)
    try:
        return kind.model_validate_json(body.removeprefix(BOM_UTF8))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json") from None
        if not first["loc"] and first["type"] == "model_type":
            raise RequestError("the body is not a JSON object", code="invalid_json") from None
        raise validation_error(error, kind) from None


def _check_nested(body: bytes) -> None:
    """Refuse a body of millions of tiny parts: no other request is answered while it is parsed, for seconds.

    The characters are counted inside of texts too, which is why the limit is far above what any request needs.

    Raises:
        RequestError: it has too many.
    """
    nested = sum(map(body.count, (b"[", b"{", b":")))
    if nested > MAX_NESTED:
        message = f"the body has {nested:,} lists, objects and keys, expected at most {MAX_NESTED:,}"
        raise RequestError(message, code="invalid_json")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result, but no more work from when the client has left: nothing else would tell."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def check_content_type(request: Request, accepted: Collection[str]) -> None:
    """A browser sends what a form could send without asking us first; none of those types is ever accepted."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in accepted:
        return
    told = f"got {show(content_type)}" if content_type else "there is none"
    expected = " or ".join(accepted)
    raise RequestError(f"content-type: {told}, expected {expected}", param="content-type", status=415, code="not_json")


def documented(kind: type[BaseModel], *, optional: bool = False) -> dict[str, Any]:
    """What OpenAPI says of a body that `read_body` reads."""
    schema = kind.model_json_schema()
    sections = schema.pop("$defs", {})
    for name, field in schema["properties"].items():
        if "$ref" in field:  # a reference would point into a document that is not OpenAPI's
            schema["properties"][name] = sections[field["$ref"].rpartition("/")[2]]
    return {"requestBody": {"required": not optional, "content": {"application/json": {"schema": schema}}}}


def rebased(schema: Mapping[str, Any]) -> Any:
    """A JSON Schema whose references point into `components.schemas`."""
    return json.loads(json.dumps(schema).replace('"#/$defs/', '"#/components/schemas/'))


def _openapi(app: FastAPI, schemas: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """FastAPI's document with our own form of errors in the place of its own."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    components |= {"Error": _ERROR, **schemas()}
    answer = {
        "description": "what is wrong",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {"4XX": answer, "503": answer}
    app.openapi_schema = document
    return document


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        messages = {
            404: f"no route {request.url.path[:200]!r}; GET /docs and /openapi.json list what there is",
            405: f"{request.method} is not for {request.url.path[:200]!r}; see the Allow header",
        }
        told = {name: value.replace("GET", "GET, HEAD") for name, value in (error.headers or {}).items()}
        return error_response(error.status_code, messages.get(error.status_code, error.detail), headers=told)
    if isinstance(error, RequestValidationError):
        return _parameter(error)
    found = _request_error(error)
    if found.refused_by and COUNT in request.scope:
        tag_version(request, *found.refused_by)
    if found.status >= 500:
        logger.error("%s %s: %s: %s", request.method, _route(request), type(error).__name__, error)
    wait = {"retry-after": str(found.retry_after or 1)}
    headers = {401: {"www-authenticate": "Bearer"}, 429: wait, 503: wait}
    return error_response(
        found.status, found.message, param=found.param, code=found.code, headers=headers.get(found.status)
    )


def _request_error(error: Exception) -> RequestError:
    """What an error of the library is in HTTP."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, JobNotFound):
        return RequestError(str(error), status=404, param="job", code="job_not_found")
    if isinstance(error, IdempotencyConflict):
        return RequestError(str(error), status=409, param="Idempotency-Key", code="idempotency_conflict")
    if isinstance(error, SpecError):
        return RequestError(str(error), code="invalid_value")
    if isinstance(error, StorageUnavailable):
        return RequestError(f"{error.reason}; try again in a moment", status=503, code="storage_away")
    if isinstance(error, KeyNotFound):
        return RequestError("it has just gone; look again", status=404, code="gone")
    if isinstance(error, StorageError):  # its message names the storage, which is the operator's to know
        return RequestError("the storage refused; the service's log says why", status=500, code="storage_error")
    if isinstance(error, DamagedObject):
        return RequestError(str(error), status=500, code="object_damaged")
    if isinstance(error, CheckpointError):
        return RequestError(str(error), status=500, code="damaged")
    return RequestError(str(error), status=409, code="refused")


def _parameter(error: RequestValidationError) -> Json:
    """A wrong parameter of path or query."""
    first = error.errors()[0]
    name = str(first["loc"][-1])[:100]
    said = first["msg"].replace("Input should be", "expected")
    if first["type"] == "extra_forbidden":
        said = "unknown parameter; see /docs"
    elif first["type"] != "missing":
        said = f"got {show(first['input'])}, {said}"
    return error_response(400, f"{name}: {said}", param=name, code="invalid_value")


def _route(request: Request) -> str:
    """The route's pattern, not the path, which is the client's text."""
    return getattr(request.scope.get("route"), "path", "?")
