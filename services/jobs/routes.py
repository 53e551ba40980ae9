"""The routes under /v1/jobs: HTTP around `services.jobs.operations`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from genmodels.storage import Storage
from services.http.app import JSON, cancel_on_disconnect, check_content_type, documented, read_body
from services.http.auth import Caller, KeyAuth
from services.http.rate_limits import Slots
from services.http.responses import Json
from services.jobs.operations import JobOperations, ReadNew
from services.jobs.schemas import (
    CancelBody,
    JobDryRun,
    JobView,
    ListQuery,
    LogQuery,
    MetricsQuery,
    Page,
    ResumeBody,
    SubmitQuery,
)
from services.jobs.views import Views

SPEC_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", *JSON)
FOLLOW_SECONDS = 1.0  # between two reads of new lines
FOLLOWERS = (64, 16)  # followed logs at the same time: of all keys, of one key
DRY_RUNS = (64, 4)  # dry runs that wait or run: of all keys, of one key
DRY_RUN_THREADS = 2
HISTORIES = (64, 16)  # metrics that are read at the same time: of all keys, of one key
HISTORY_THREADS = 4


def add_job_routes(
    app: FastAPI, guard: KeyAuth, storage: Storage, closing: Callable[[], bool], endpoint: str | None = None
) -> Views:
    """Add the routes to the application, and return the views that they read.

    Args:
        closing: return whether the service is about to end; followed logs end then.
        endpoint: URL of the gateway, shown with each job.
    """
    operations, submit, admin = JobOperations(storage, endpoint), guard("submit"), guard("admin")
    log_threads, followers = ThreadPoolExecutor(8, "logs"), Slots("followed logs", *FOLLOWERS)
    history_threads, histories = ThreadPoolExecutor(HISTORY_THREADS, "histories"), Slots("histories", *HISTORIES)
    dry_run_threads, dry_runs = ThreadPoolExecutor(DRY_RUN_THREADS, "dry-runs"), Slots("dry runs", *DRY_RUNS)

    async def dry_run(body: bytes, caller: Caller) -> JobDryRun:
        gone = threading.Event()
        try:
            in_thread = asyncio.get_running_loop().run_in_executor
            return await in_thread(dry_run_threads, operations.dry_run, body, caller, gone.is_set)
        finally:
            gone.set()

    @app.post("/v1/jobs", status_code=201, response_model=JobView, openapi_extra=_SPEC_BODY)
    async def submit_job(
        request: Request,
        query: Annotated[SubmitQuery, Query()],
        idempotency_key: Annotated[
            str | None,
            Header(
                max_length=255,
                pattern=r"^[!-~]([ -~]*[!-~])?$",
                description="any text that is new for each job; a repeated request with it returns the same job",
            ),
        ] = None,
        caller: Caller = submit,
    ) -> Response:
        """Submit a job.

        With an `Idempotency-Key`, a repeated request returns the same job and 200. A dry run returns 200 and what
        would run.
        """
        check_content_type(request, SPEC_TYPES)
        body = await request.body()
        if query.dry_run:
            with dry_runs.take(caller.id):
                return _json(await cancel_on_disconnect(request, dry_run(body, caller)))
        view, new = await run_in_threadpool(operations.submit, body, caller, idempotency_key)
        return _json(view, 201 if new else 200, location=f"/v1/jobs/{view.job}")

    @app.get("/v1/jobs", response_model=Page)
    def list_jobs(query: Annotated[ListQuery, Query()], caller: Caller = submit) -> Response:
        """List jobs: open ones, then ended ones, newest first."""
        return _json(operations.views.page(query.state, query.limit, query.after, caller.may_use))

    @app.get("/v1/jobs/{job}", response_model=JobView)
    def show_job(job: str, caller: Caller = submit) -> Response:
        """Show a job: state, progress and history of each of its models."""
        return _json(operations.view(job, caller))

    @app.get("/v1/jobs/{job}/logs", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_logs(job: str, query: Annotated[LogQuery, Query()], caller: Caller = submit) -> Response:
        """Read the output of a job's driver and workers, while the job runs and afterwards."""
        in_thread = asyncio.get_running_loop().run_in_executor

        async def text(read_new: ReadNew, parts: Iterator[bytes], ended: bool, part: bytes) -> AsyncIterator[bytes]:
            while True:
                while part:
                    yield part
                    await caller.recheck()
                    part = await in_thread(log_threads, next, parts, b"")
                if not query.follow or ended or closing():
                    return
                await asyncio.sleep(FOLLOW_SECONDS)
                await caller.recheck()
                parts, ended = await in_thread(log_threads, read_new)
                part = await in_thread(log_threads, next, parts, b"")

        with contextlib.ExitStack() as held:
            if query.follow:
                held.enter_context(followers.take(caller.id))
            read_new = await in_thread(log_threads, operations.logs, job, query, caller)
            parts, ended = await in_thread(log_threads, read_new)
            first = await in_thread(log_threads, next, parts, b"")  # an error here still becomes an error response
            return _ClosingStream(text(read_new, parts, ended, first), "text/plain", held.pop_all().close)

    @app.get("/v1/jobs/{job}/metrics")
    async def read_metrics(
        job: str, request: Request, query: Annotated[MetricsQuery, Query()], caller: Caller = submit
    ) -> Response:
        """Read a model's metrics: one row for each logged step of the run's whole history."""
        in_thread = asyncio.get_running_loop().run_in_executor

        async def begin() -> tuple[Iterator[bytes], bytes]:
            read = await in_thread(history_threads, operations.metrics, job, query, caller)
            while (parts := await in_thread(history_threads, read)) is None:
                continue
            return parts, await in_thread(history_threads, next, parts, b"")

        async def document(parts: Iterator[bytes], part: bytes) -> AsyncIterator[bytes]:
            while part:
                yield part
                await caller.recheck()
                part = await in_thread(history_threads, next, parts, b"")

        with contextlib.ExitStack() as held:
            held.enter_context(histories.take(caller.id))
            begun = await cancel_on_disconnect(request, begin())  # an error here still becomes an error response
            return _ClosingStream(document(*begun), "application/json", held.pop_all().close)

    @app.post("/v1/jobs/{job}/cancel", response_model=JobView, openapi_extra=documented(CancelBody, optional=True))
    async def cancel_job(job: str, request: Request, caller: Caller = submit) -> Response:
        """Cancel a job: its runs save and end, and can be resumed. Runs that have ended stay unchanged."""
        body = await read_body(CancelBody, request, optional=True)
        return _json(await run_in_threadpool(operations.cancel, job, body, caller))

    @app.post("/v1/jobs/{job}/resume", response_model=JobView, openapi_extra=documented(ResumeBody, optional=True))
    async def resume_job(job: str, request: Request, caller: Caller = submit) -> Response:
        """Resume the failed and cancelled runs of a job, each from its newest checkpoint."""
        body = await read_body(ResumeBody, request, optional=True)
        return _json(await run_in_threadpool(operations.resume, job, body, caller))

    @app.delete("/v1/jobs/{job}", status_code=204, response_class=Response)
    def delete_job(job: str, caller: Caller = admin) -> Response:
        """Delete an ended job with its checkpoints, logs and metrics. Versions published from it stay."""
        operations.delete(job, caller)
        return Response(status_code=204)

    return operations.views


class _ClosingStream(StreamingResponse):
    """A stream that calls `done` when it has ended or its client has disconnected, even before the first byte."""

    def __init__(self, content: AsyncIterator[bytes], media_type: str, done: Callable[[], None]) -> None:
        super().__init__(content, media_type=media_type, headers={"cache-control": "no-store"})
        self.done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


def _json(model: BaseModel, status: int = 200, **headers: str) -> Json:
    return Json(model.model_dump(mode="json"), status, headers)


_SPEC_EXAMPLE = """\
name: shapes
models:
  - name: vae-fashion
    model: {family: vae, latent_dim: 32}
    data: {dataset: fashion-mnist}
    train: {max_steps: 3000, batch_size: 128}
"""
_SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/yaml": {"example": _SPEC_EXAMPLE, "schema": {"type": "string"}},
            "application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}},
        },
    },
}
