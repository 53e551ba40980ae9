"""The routes under /v1/jobs. They read and write storage alone; the dispatcher does the rest, when it sees to it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from heapq import merge
from itertools import islice
from typing import Annotated, Literal

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from genmodels.data import uploads
from genmodels.errors import DamagedObject, RequestError, SpecError
from genmodels.preflight.check import Checked, check_job
from genmodels.registry.references import resolve_references
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import ENDED, Status
from genmodels.runs.store import Run
from genmodels.runs.thinning import thinned_rows
from genmodels.schema.field_errors import nearest, show
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage
from services.http.app import JSON, check_content_type, documented, read_body, unless_gone
from services.http.auth import Caller, Guard
from services.http.rate_limits import Slots
from services.http.responses import Json
from services.jobs.dry_run import JobPlan, Planner
from services.jobs.schemas import CancelBody, JobView, ListQuery, LogQuery, MetricsQuery, Page, ResumeBody, SubmitQuery
from services.jobs.views import Views

SPEC_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", *JSON)
FOLLOW_SECONDS = 1.0  # between two looks for new lines
FOLLOWERS = (64, 16)  # of all, of one key
PLANS = (64, 4)  # dry runs that wait or are worked on
PLANNERS = 2  # threads
LINES_AT_ONCE = 1000

Look = Callable[[], tuple[Iterator[bytes], bool]]


class JobRoutes:
    """What the routes do, without HTTP: called in threads."""

    def __init__(self, storage: Storage, endpoint: str | None = None) -> None:
        self.storage, self.jobs = storage, Jobs(storage)
        self.views, self.planner = Views(storage, endpoint), Planner(storage)

    def plan(self, body: bytes, caller: Caller, gone: Callable[[], bool]) -> JobPlan:
        """Tell what a job would be."""
        with _refusing():
            checked, capacity = self._checked(body, caller, planned=True)
            plan = self.planner.plan(checked.job, capacity, gone)
        for model in plan.models:
            model.notes += checked.notes[model.model]
        return plan

    def submit(self, body: bytes, caller: Caller, key: str | None) -> tuple[JobView, bool]:
        """Put a job into the queue; the job, and whether it is new."""
        with _refusing():
            checked, _ = self._checked(body, caller, planned=False)
            spec = resolve_references(checked.job, self.storage)
        digest = hashlib.sha256(body).hexdigest()
        job, new = self.jobs.submit(spec, caller=caller.id, idempotency_key=key, body_digest=digest)
        if not new:
            return self.views.job(job), False
        notes = [f"{model}: {note}" for model, notes in checked.notes.items() for note in notes]
        return self.views.submitted(self.jobs.entry(job), spec, notes), True

    def cancel(self, job: str, body: CancelBody, caller: Caller) -> JobView:
        action: Literal["stop", "kill"] = "kill" if body.now else "stop"
        for run, status in self._runs(job, body.models, caller):
            waiting = [(w.action, w.then) for w in run.commands(after=status.last_command)]
            if status.state in ENDED and ("resume", "queued") not in waiting:
                continue
            if (action, "cancelled") not in waiting:  # a client that asks again asks for the same
                run.send_command(action, status.attempt, f"cancelled {caller.reason}", then="cancelled")
            self.jobs.notify(job, run.model)
        return self.views.job(job)

    def resume(self, job: str, body: ResumeBody, caller: Caller) -> JobView:
        runs = self._runs(job, body.models, caller)
        stopped = [(run, status) for run, status in runs if status.state in ("failed", "cancelled")]
        if not stopped:
            found = ", ".join(f"{run.model} is {status.state}" for run, status in runs)
            message = f"nothing to resume in {job}: {found}; only what failed or was cancelled can be resumed"
            raise RequestError(message, status=409, code="nothing_to_resume")
        self.jobs.reopen(job)
        for run, status in stopped:
            if not any(
                command.action == "resume" for command in run.commands(status.attempt, after=status.last_command)
            ):
                run.send_command("resume", status.attempt, f"resumed {caller.reason}")
            self.jobs.notify(job, run.model)
        return self.views.job(job)

    def view(self, job: str, caller: Caller) -> JobView:
        self._spec(job, caller)
        return self.views.job(job)

    def delete(self, job: str, caller: Caller) -> None:
        self._spec(job, caller)
        self.jobs.delete(job)

    def metrics(self, job: str, query: MetricsQuery, caller: Caller) -> Iterator[bytes]:
        """The answer in parts, of which few rows are in memory at a time."""
        names = [model.name for model in self._spec(job, caller).models]
        if query.model is None and len(names) > 1:
            raise RequestError(f"missing; name one of {', '.join(names)}", param="model", code="missing")
        (model,) = _chosen(names, None if query.model is None else [query.model])
        rows: Iterable[bytes] = Run(self.storage, job, model).metric_lines(query.after)
        return _document(model, rows if query.points is None else thinned_rows(rows, query.points))

    def logs(self, job: str, query: LogQuery, caller: Caller) -> Look:
        """A function that gives what has come since it was last called, and whether no more will."""
        models = self._spec(job, caller).models
        chosen = _chosen([model.name for model in models], query.model or None)
        _check_source(query.source, max(m.scaling.max_workers for m in models if m.name in chosen))
        runs = [Run(self.storage, job, model) for model in chosen]
        cursors: list[dict[str, str]] = [{} for _ in runs]

        def look() -> tuple[Iterator[bytes], bool]:
            ended = all(map(_has_ended, runs))  # first, so that the last lines are seen
            streams = (_lines(run, query.source, seen) for run, seen in zip(runs, cursors, strict=True))
            return _packed(text for _, text in merge(*streams)), ended

        return look

    def _checked(self, body: bytes, caller: Caller, *, planned: bool) -> tuple[Checked, dict[str, int] | None]:
        """The job that a body describes, and what the cluster has."""
        spec = parse_spec(body, "spec", datasets=uploads.kinds(self.storage), paths=False)
        caller.need(model.name for model in spec.models)
        caller.need(filter(None, (model.train.init_from for model in spec.models)))
        capacity = self.views.queue().capacity
        spec = resolve_references(spec, self.storage, pin=False)
        return check_job(spec, self.storage, capacity=capacity, planned=planned), capacity

    def _runs(self, job: str, models: list[str] | None, caller: Caller) -> list[tuple[Run, Status]]:
        names = [model.name for model in self._spec(job, caller).models]
        self.jobs.entry(job)  # not one of `genmodels run`, which nobody dispatches
        runs = [Run(self.storage, job, model) for model in _chosen(names, models)]
        return [(run, run.status()[0]) for run in runs]

    def _spec(self, job: str, caller: Caller) -> JobSpec:
        """A job's spec, if this caller may know of it."""
        spec = self.jobs.spec(job)
        caller.need_job(model.name for model in spec.models)
        return spec


def add_job_routes(
    app: FastAPI, guard: Guard, storage: Storage, closing: Callable[[], bool], endpoint: str | None = None
) -> Views:
    """Add the routes.

    Args:
        closing: whether the service is about to end, and nobody may be kept waiting.
        endpoint: URL of the gateway, which clients are told.
    """
    routes, submit, admin = JobRoutes(storage, endpoint), guard("submit"), guard("admin")
    log_threads, followers = ThreadPoolExecutor(8, "logs"), Slots("followed logs", *FOLLOWERS)
    planners, plans = ThreadPoolExecutor(PLANNERS, "plans"), Slots("dry runs", *PLANS)

    async def plan(body: bytes, caller: Caller) -> JobPlan:
        gone = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(planners, routes.plan, body, caller, gone.is_set)
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
            with plans.take(caller.id):
                return _json(await unless_gone(request, plan(body, caller)))
        view, new = await run_in_threadpool(routes.submit, body, caller, idempotency_key)
        return _json(view, 201 if new else 200, location=f"/v1/jobs/{view.job}")

    @app.get("/v1/jobs", response_model=Page)
    def list_jobs(query: Annotated[ListQuery, Query()], caller: Caller = submit) -> Response:
        """List jobs: open ones, then ended ones, newest first."""
        return _json(routes.views.page(query.state, query.limit, query.after, caller.may_use))

    @app.get("/v1/jobs/{job}", response_model=JobView)
    def show_job(job: str, caller: Caller = submit) -> Response:
        """Show a job: state, progress and history of each of its models."""
        return _json(routes.view(job, caller))

    @app.get("/v1/jobs/{job}/logs", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_logs(job: str, query: Annotated[LogQuery, Query()], caller: Caller = submit) -> Response:
        """Read the output of a job's driver and workers, while the job runs and afterwards."""
        in_thread = asyncio.get_running_loop().run_in_executor

        async def text(look: Look, parts: Iterator[bytes], ended: bool, part: bytes) -> AsyncIterator[bytes]:
            while True:
                while part:
                    yield part
                    await caller.recheck()
                    part = await in_thread(log_threads, next, parts, b"")
                if not query.follow or ended or closing():
                    return
                await asyncio.sleep(FOLLOW_SECONDS)
                await caller.recheck()
                parts, ended = await in_thread(log_threads, look)
                part = await in_thread(log_threads, next, parts, b"")

        with contextlib.ExitStack() as held:
            if query.follow:
                held.enter_context(followers.take(caller.id))
            look = await in_thread(log_threads, routes.logs, job, query, caller)
            parts, ended = await in_thread(log_threads, look)
            first = await in_thread(log_threads, next, parts, b"")  # an error that is told now is an answer of its own
            return _Held(text(look, parts, ended, first), "text/plain", held.pop_all().close)

    @app.get("/v1/jobs/{job}/metrics")
    async def read_metrics(job: str, query: Annotated[MetricsQuery, Query()], caller: Caller = submit) -> Response:
        """Read a model's metrics: one row for each logged step of the run's whole history."""
        in_thread = asyncio.get_running_loop().run_in_executor
        parts = await in_thread(log_threads, routes.metrics, job, query, caller)
        first = await in_thread(log_threads, next, parts, b"")  # an error that is told now is an answer of its own

        async def document() -> AsyncIterator[bytes]:
            part = first
            while part:
                yield part
                await caller.recheck()
                part = await in_thread(log_threads, next, parts, b"")

        return StreamingResponse(document(), media_type="application/json")

    @app.post("/v1/jobs/{job}/cancel", response_model=JobView, openapi_extra=documented(CancelBody, optional=True))
    async def cancel_job(job: str, request: Request, caller: Caller = submit) -> Response:
        """Cancel a job: its runs save and end, and can be resumed. Runs that have ended stay unchanged."""
        body = await read_body(CancelBody, request, optional=True)
        return _json(await run_in_threadpool(routes.cancel, job, body, caller))

    @app.post("/v1/jobs/{job}/resume", response_model=JobView, openapi_extra=documented(ResumeBody, optional=True))
    async def resume_job(job: str, request: Request, caller: Caller = submit) -> Response:
        """Resume the failed and cancelled runs of a job, each from its newest checkpoint."""
        body = await read_body(ResumeBody, request, optional=True)
        return _json(await run_in_threadpool(routes.resume, job, body, caller))

    @app.delete("/v1/jobs/{job}", status_code=204, response_class=Response)
    def delete_job(job: str, caller: Caller = admin) -> Response:
        """Delete an ended job with its checkpoints, logs and metrics. Versions published from it stay."""
        routes.delete(job, caller)
        return Response(status_code=204)

    return routes.views


class _Held(StreamingResponse):
    """A stream that holds something until it has ended, or its client has left, maybe before it began."""

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


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with a spec, as the client is told."""
    try:
        yield
    except SpecError as error:
        raise RequestError(str(error), param=_path(error), code="invalid_spec") from None


def _chosen(names: list[str], models: Iterable[str] | None) -> list[str]:
    for model in models or ():
        if model not in names:
            known = f"this job has {', '.join(names)}{nearest(model, names)}"
            raise RequestError(f"got {show(model)}; {known}", param="model", status=404, code="model_not_found")
    return [name for name in names if models is None or name in models]


def _check_source(source: str | None, workers: int) -> None:
    if source in (None, "driver") or int(source or 0) < workers:
        return
    ranks = "worker 0" if workers == 1 else f"the workers 0 to {workers - 1}"
    message = f"got {show(source)}; what there is: driver and {ranks}"
    raise RequestError(f"source: {message}", param="source", status=404, code="source_not_found")


def _has_ended(run: Run) -> bool:
    """Also of a run whose status is damaged: nobody carries it on."""
    try:
        return run.status()[0].state in ENDED
    except DamagedObject:
        return True


def _path(error: SpecError) -> str | None:
    """The field that the first problem is about: `spec:3: models[0].train.seed: ...`."""
    found = re.match(r"(?:spec:(?:\d+:)? )?([a-z]\w*(?:[.\[][^:\s]{1,200})?): ", error.problems[0])
    return found[1] if found else None


def _lines(run: Run, source: str | None, seen: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(time, line as it is shown) of what is new. A terminal's control characters do not get through."""
    for found in run.log_lines(source, seen):
        text = re.sub(r"[^\t\x20-\x7e\xa0-\U0010ffff]", "?", found.line)
        yield found.time, f"{found.time} {run.model}/{found.source} {text}\n"


def _packed(lines: Iterator[str]) -> Iterator[bytes]:
    while part := "".join(islice(lines, LINES_AT_ONCE)):
        yield part.encode(errors="replace")


def _document(model: str, rows: Iterable[bytes]) -> Iterator[bytes]:
    """JSON with rows that are JSON already."""
    rows, head = iter(rows), f'{{"model":{json.dumps(model)},"data":['.encode()
    packed = list(islice(rows, LINES_AT_ONCE))
    while following := list(islice(rows, LINES_AT_ONCE)):
        yield head + b",".join(packed)
        head, packed = b",", following
    yield head + b",".join(packed) + b"]}"


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
