"""The common parts of both HTTP APIs: strict bodies with their documentation, and one format of errors."""

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
MAX_NESTED = 2**18  # lists, objects and keys of a body: 64 images of 256 rows in 3 channels have 50,000 lists

logger = logging.getLogger("genmodels.api")

BodyT = TypeVar("BodyT", bound=BaseModel)
T = TypeVar("T")


async def _healthy() -> str | None:
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
    health: Callable[[], Awaitable[str | None]] = _healthy,
) -> FastAPI:
    """Create an application behind an IngressMiddleware, with `/openapi.json` and the page `/docs`.

    Args:
        hosts, max_body, streamed, max_requests: see IngressMiddleware.
        schemas: returns additional `components.schemas` of OpenAPI; called at the first request of the document.
        health: returns why the service is unhealthy, or None if it is healthy.
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
    """Read a request's JSON body as `kind`, strictly.

    Args:
        optional: an empty body stands for `{}`.

    Raises:
        RequestError: the body is wrong; names the field.
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
    """Refuse a body of millions of tiny parts: its parsing would delay all other requests for seconds.

    The characters are also counted inside strings, so the limit is far above the needs of any request.

    Raises:
        RequestError: the body has too many parts.
    """
    nested = sum(map(body.count, (b"[", b"{", b":")))
    if nested > MAX_NESTED:
        message = f"the body has {nested:,} lists, objects and keys, expected at most {MAX_NESTED:,}"
        raise RequestError(message, code="invalid_json")


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel `work` when the client disconnects, because no other code notices that."""
    task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    await request.body()  # after it comes only the client's disconnect
    await request.receive()


def check_content_type(request: Request, accepted: Collection[str]) -> None:
    """Refuse other content types, also those of HTML forms: browsers send forms from any site without a preflight."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in accepted:
        return
    actual = f"got {show(content_type)}" if content_type else "missing"
    expected = " or ".join(accepted)
    raise RequestError(
        f"content-type: {actual}, expected {expected}", param="content-type", status=415, code="not_json"
    )


def documented(kind: type[BaseModel], *, optional: bool = False) -> dict[str, Any]:
    """Return the OpenAPI description of a body that `read_body` reads."""
    schema = kind.model_json_schema()
    sections = schema.pop("$defs", {})
    for name, field in schema["properties"].items():
        if "$ref" in field:  # the reference is not valid inside the OpenAPI document
            schema["properties"][name] = sections[field["$ref"].rpartition("/")[2]]
    return {"requestBody": {"required": not optional, "content": {"application/json": {"schema": schema}}}}


def rebased(schema: Mapping[str, Any]) -> Any:
    """Return a JSON Schema with its references changed to `components.schemas`."""
    return json.loads(json.dumps(schema).replace('"#/$defs/', '"#/components/schemas/'))


def _openapi(app: FastAPI, schemas: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return FastAPI's document with our format of errors."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    components |= {"Error": _ERROR, **schemas()}
    answer = {
        "description": "an error",
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
                "param": {"type": ["string", "null"], "description": "the wrong field"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        messages = {
            404: f"no route {request.url.path[:200]!r}; GET /docs and /openapi.json list the routes",
            405: f"{request.method} is not allowed for {request.url.path[:200]!r}; see the Allow header",
        }
        headers = {name: value.replace("GET", "GET, HEAD") for name, value in (error.headers or {}).items()}
        return error_response(error.status_code, messages.get(error.status_code, error.detail), headers=headers)
    if isinstance(error, RequestValidationError):
        return _parameter(error)
    request_error = _request_error(error)
    if request_error.refused_by and COUNT in request.scope:
        tag_version(request, *request_error.refused_by)
    if request_error.status >= 500:
        logger.error("%s %s: %s: %s", request.method, _route(request), type(error).__name__, error)
    wait = {"retry-after": str(request_error.retry_after or 1)}
    extra_headers = {401: {"www-authenticate": "Bearer"}, 429: wait, 503: wait}
    return error_response(
        request_error.status,
        request_error.message,
        param=request_error.param,
        code=request_error.code,
        headers=extra_headers.get(request_error.status),
    )


def _request_error(error: Exception) -> RequestError:
    """Convert an error of the library to an error in HTTP."""
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
        return RequestError("the object was deleted just now; read the list again", status=404, code="gone")
    if isinstance(
        error, StorageError
    ):  # its message contains the address of the storage, which is for the operator only
        return RequestError(
            "the storage refused the operation; the log of the service has the reason", status=500, code="storage_error"
        )
    if isinstance(error, DamagedObject):
        return RequestError(str(error), status=500, code="object_damaged")
    if isinstance(error, CheckpointError):
        return RequestError(str(error), status=500, code="damaged")
    return RequestError(str(error), status=409, code="refused")


def _parameter(error: RequestValidationError) -> Json:
    """Answer a wrong parameter of path or query."""
    first = error.errors()[0]
    name = str(first["loc"][-1])[:100]
    reason = first["msg"].replace("Input should be", "expected")
    if first["type"] == "extra_forbidden":
        reason = "unknown parameter; see /docs"
    elif first["type"] != "missing":
        reason = f"got {show(first['input'])}, {reason}"
    return error_response(400, f"{name}: {reason}", param=name, code="invalid_value")


def _route(request: Request) -> str:
    """Return the pattern of the route for the log; clients choose the path itself."""
    return getattr(request.scope.get("route"), "path", "?")
