"""The routes under /v1/jobs. They read and write storage alone; the dispatcher does the rest, when it sees to it."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from heapq import merge
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from genmodels.data import stored
from genmodels.engine.requests import Body
from genmodels.errors import DamagedObject, RequestError, SpecError
from genmodels.explain import nearest, show
from genmodels.job import Jobs
from genmodels.pin import pin
from genmodels.precheck import check_job
from genmodels.run import ENDED, Run, Status
from genmodels.spec import JobSpec, Label, parse_spec
from genmodels.storage import Storage, encode_floats
from services.api import JSON, Strict, check_content_type, documented, read_body
from services.auth import Caller, Guard
from services.edge import Json
from services.plans import JobPlan, Planner
from services.views import JobView, Page, Views

SPEC_TYPES = ("application/yaml", "application/x-yaml", "text/yaml", *JSON)
FOLLOW_SECONDS = 1.0  # between two looks for new lines
MOST_FOLLOWERS = 64
LINES_AT_ONCE = 1000

Names = Annotated[list[Label] | None, Field(max_length=100)]


class SubmitQuery(Strict):
    dry_run: bool = Field(False, description="only report what would run")


class ListQuery(Strict):
    state: Literal["all", "open", "ended"] = Field("all", description="which jobs; open jobs are queued or running")
    limit: int = Field(20, ge=1, le=100, description="largest number of jobs on a page")
    after: str = Field(
        "", max_length=300, pattern=r"^((open|ended)![\w :.+!-]*)?$", description="`next` of the page before"
    )


class LogQuery(Strict):
    model: list[str] = Field([], max_length=100, description="only the logs of these models of the job")
    follow: bool = Field(False, description="continue until the job has ended")
    source: str | None = Field(None, pattern=r"^(driver|[0-9]{1,4})$", description="`driver`, or a worker's rank")


class MetricsQuery(Strict):
    model: str | None = Field(
        None, max_length=100, description="model of the job; required if the job has several models"
    )
    after: int = Field(0, ge=0, le=10**9, description="only rows of later steps")


class CancelBody(Body):
    now: bool = Field(False, description="end at once, and lose the steps since the last checkpoint")
    models: Names = Field(None, description="only these models of the job")


class ResumeBody(Body):
    models: Names = Field(None, description="only these models of the job")


class JobRoutes:
    """What the routes do, without HTTP: called in threads."""

    def __init__(self, storage: Storage, endpoint: str | None) -> None:
        self.storage, self.jobs = storage, Jobs(storage)
        self.views, self.planner = Views(storage, endpoint), Planner(storage)

    def submit(self, body: bytes, caller: Caller, key: str | None, dry_run: bool) -> JobPlan | tuple[JobView, bool]:
        """Put a job into the queue; the job, and whether it is new."""
        try:
            spec = parse_spec(body, "spec", datasets=stored.kinds(self.storage), paths=False)
            caller.need(model.name for model in spec.models)
            caller.need(filter(None, (model.train.init_from for model in spec.models)))
            capacity = self.views.queue().capacity
            spec = pin(spec, self.storage, mark=False)
            checked = check_job(spec, self.storage, capacity=capacity, planned=dry_run)
            if dry_run:
                plan = self.planner.plan(checked.job, capacity)
                for model in plan.models:
                    model.notes += checked.notes[model.model]
                return plan
            spec = pin(checked.job, self.storage)
        except SpecError as error:
            raise RequestError(str(error), param=_path(error), code="invalid_spec") from None
        digest = hashlib.sha256(body).hexdigest()
        job, new = self.jobs.submit(spec, caller=caller.id, idempotency_key=key, body_digest=digest)
        if not new:
            return self.views.job(job), False
        notes = [f"{model}: {note}" for model, notes in checked.notes.items() for note in notes]
        return self.views.submitted(self.jobs.entry(job), spec, notes), True

    def cancel(self, job: str, body: CancelBody, caller: Caller) -> JobView:
        wish: Literal["leave", "kill"] = "kill" if body.now else "leave"
        for run, status in self._runs(job, body.models, caller):
            waiting = [(w.wish, w.then) for w in run.wishes(after=status.wishes)]
            if status.state in ENDED and ("resume", "queued") not in waiting:
                continue
            if (wish, "cancelled") not in waiting:  # a client that asks again asks for the same
                run.wish(wish, status.attempt, f"cancelled {caller.reason}", then="cancelled")
            self.jobs.nudge(job, run.model)
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
            if not any(wish.wish == "resume" for wish in run.wishes(status.attempt, after=status.wishes)):
                run.wish("resume", status.attempt, f"resumed {caller.reason}")
            self.jobs.nudge(job, run.model)
        return self.views.job(job)

    def view(self, job: str, caller: Caller) -> JobView:
        self._spec(job, caller)
        return self.views.job(job)

    def delete(self, job: str, caller: Caller) -> None:
        self._spec(job, caller)
        self.jobs.delete(job)

    def metrics(self, job: str, query: MetricsQuery, caller: Caller) -> dict[str, Any]:
        names = [model.name for model in self._spec(job, caller).models]
        if query.model is None and len(names) > 1:
            raise RequestError(f"missing; name one of {', '.join(names)}", param="model", code="missing")
        (model,) = _chosen(names, None if query.model is None else [query.model])
        rows = [row for row in Run(self.storage, job, model).metrics() if row["step"] > query.after]
        return {"model": model, "data": encode_floats(rows)}

    def logs(self, job: str, query: LogQuery, caller: Caller) -> Callable[[], tuple[Iterator[bytes], bool]]:
        """A function that gives what has come since it was last called, and whether no more will."""
        models = self._spec(job, caller).models
        chosen = _chosen([model.name for model in models], query.model or None)
        _check_source(query.source, max(m.scaling.most_workers for m in models if m.name in chosen))
        runs = [Run(self.storage, job, model) for model in chosen]
        cursors: list[dict[str, str]] = [{} for _ in runs]

        def look() -> tuple[Iterator[bytes], bool]:
            ended = all(map(_has_ended, runs))  # first, so that the last lines are seen
            streams = (_lines(run, query.source, seen) for run, seen in zip(runs, cursors, strict=True))
            return _packed(text for _, text in merge(*streams)), ended

        return look

    def _runs(self, job: str, models: list[str] | None, caller: Caller) -> list[tuple[Run, Status]]:
        names = [model.name for model in self._spec(job, caller).models]
        self.jobs.entry(job)  # not one of `genmodels run`, which nobody dispatches
        runs = [Run(self.storage, job, model) for model in _chosen(names, models)]
        return [(run, run.status()[0]) for run in runs]

    def _spec(self, job: str, caller: Caller) -> JobSpec:
        """A job's spec, if this caller may know of it."""
        spec = self.jobs.spec(job)
        caller.need(model.name for model in spec.models)
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
    log_threads, followers = ThreadPoolExecutor(8, "logs"), [0]

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
        found = await run_in_threadpool(routes.submit, body, caller, idempotency_key, query.dry_run)
        if isinstance(found, JobPlan):
            return _json(found)
        view, new = found
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
        if query.follow and followers[0] >= MOST_FOLLOWERS:
            raise RequestError("too many follow logs already; try again in a moment", status=429, code="too_many")
        in_thread = asyncio.get_running_loop().run_in_executor
        look = await in_thread(log_threads, routes.logs, job, query, caller)
        parts, ended = await in_thread(log_threads, look)
        first = await in_thread(log_threads, next, parts, b"")  # an error that is told now is an answer of its own

        async def text() -> AsyncIterator[bytes]:
            nonlocal parts, ended
            followers[0] += query.follow
            try:
                part = first
                while True:
                    while part:
                        yield part
                        part = await in_thread(log_threads, next, parts, b"")
                    if not query.follow or ended or closing():
                        return
                    await asyncio.sleep(FOLLOW_SECONDS)
                    parts, ended = await in_thread(log_threads, look)
                    part = await in_thread(log_threads, next, parts, b"")
            finally:
                followers[0] -= query.follow

        return StreamingResponse(text(), media_type="text/plain", headers={"cache-control": "no-store"})

    @app.get("/v1/jobs/{job}/metrics")
    def read_metrics(job: str, query: Annotated[MetricsQuery, Query()], caller: Caller = submit) -> Response:
        """Read a model's metrics: one row for each logged step of the run's whole history."""
        return Json(routes.metrics(job, query, caller))

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


def _json(model: BaseModel, status: int = 200, **headers: str) -> Json:
    return Json(model.model_dump(mode="json"), status, headers)


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
