"""The operations of the job API, without HTTP. They only read and write storage; the dispatcher acts on it later."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from typing import Literal

from genmodels.data import added
from genmodels.errors import DamagedObject, RequestError, SpecError
from genmodels.preflight.check import Checked, check_job
from genmodels.registry.references import resolve_references
from genmodels.runs.jobs import Entry, Jobs
from genmodels.runs.log_lines import Cursor
from genmodels.runs.metric_rows import metric_lines
from genmodels.runs.queue import Queue, notify
from genmodels.runs.records import ENDED, Status
from genmodels.runs.store import Run
from genmodels.runs.thinning import ThinnedHistories
from genmodels.schema.field_errors import nearest, show
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage
from services.gateway.pool_config import WatchedPools
from services.http.auth import Caller
from services.jobs import dry_run
from services.jobs.lines import json_document, pack, shown_lines
from services.jobs.schemas import CancelBody, JobDryRun, JobView, LogQuery, MetricsQuery, ResumeBody
from services.jobs.views import Views

ReadNew = Callable[[], tuple[Iterator[bytes], bool]]


@dataclass(frozen=True)
class _Chosen:
    """A job as one request reads it, with the runs that the request names and their statuses."""

    entry: Entry
    spec: JobSpec
    runs: list[tuple[Run, Status]]


class JobOperations:
    """One method for each route; thread-safe."""

    def __init__(self, storage: Storage, endpoint: str | None = None) -> None:
        self.storage, self.jobs = storage, Jobs(storage)
        self.views = Views(storage, endpoint)
        self._pools = WatchedPools()
        self._histories = ThinnedHistories()

    def dry_run(self, body: bytes, caller: Caller, gone: Callable[[], bool]) -> JobDryRun:
        """Report what a spec would run.

        Args:
            gone: return whether the client has disconnected.
        """
        with _spec_errors():
            checked, queue = self._check(body, caller, dry_run=True)
            pools = self._pools.read().memory
            report = dry_run.report(checked.job, self.storage, queue.capacity, pools, queue.worker_memory, gone)
        for model in report.models:
            model.notes += checked.notes[model.model]
        return report

    def submit(self, body: bytes, caller: Caller, key: str | None) -> tuple[JobView, bool]:
        """Queue a job, and return it and whether it is new: a known idempotency key returns the job it made before."""
        with _spec_errors():
            checked, _ = self._check(body, caller, dry_run=False)
            spec = resolve_references(checked.job, self.storage)
        digest = hashlib.sha256(body).hexdigest()
        job, new = self.jobs.submit(spec, caller=caller.id, idempotency_key=key, body_digest=digest)
        if not new:
            return self.views.job(job), False
        notes = [f"{model}: {note}" for model, notes in checked.notes.items() for note in notes]
        return self.views.submitted(self.jobs.entry(job), spec, notes), True

    def cancel(self, job: str, body: CancelBody, caller: Caller) -> JobView:
        """Write a stop command for each open run; the view shows the states before the dispatcher acts on it."""
        action: Literal["stop", "kill"] = "kill" if body.now else "stop"
        chosen = self._choose_runs(job, body.models, caller)
        for run, status in chosen.runs:
            waiting = [(c.action, c.then) for c in run.commands(after=status.last_command)]
            if status.state in ENDED and ("resume", "queued") not in waiting:
                continue
            if (action, "cancelled") not in waiting:  # a repeated request changes nothing
                run.send_command(action, status.attempt, f"cancelled {caller.reason}", then="cancelled")
            notify(self.storage, job, run.model)
        return self._view(chosen)

    def resume(self, job: str, body: ResumeBody, caller: Caller) -> JobView:
        """Write a resume command for each failed or cancelled run.

        Raises:
            RequestError: there is no such run.
        """
        chosen = self._choose_runs(job, body.models, caller)
        stopped = [(run, status) for run, status in chosen.runs if status.state in ("failed", "cancelled")]
        if not stopped:
            states = ", ".join(f"{run.model} is {status.state}" for run, status in chosen.runs)
            message = f"nothing to resume in {job}: {states}; only failed and cancelled runs can be resumed"
            raise RequestError(message, status=409, code="nothing_to_resume")
        self.jobs.reopen(job)
        for run, status in stopped:
            waiting = run.commands(status.attempt, after=status.last_command)
            if not any(command.action == "resume" for command in waiting):
                run.send_command("resume", status.attempt, f"resumed {caller.reason}")
            notify(self.storage, job, run.model)
        return self._view(chosen)

    def view(self, job: str, caller: Caller) -> JobView:
        spec = self._spec(job, caller)
        return self.views.one(self.jobs.entry(job), spec)

    def delete(self, job: str, caller: Caller) -> None:
        self._spec(job, caller)
        self.jobs.delete(job)

    def metrics(self, job: str, query: MetricsQuery, caller: Caller) -> Callable[[], Iterator[bytes] | None]:
        """Return a function that returns a model's metrics as parts of one JSON document, or None: call it again.

        Few rows are in memory at a time.
        """
        names = [model.name for model in self._spec(job, caller).models]
        if query.model is None and len(names) > 1:
            raise RequestError(f"missing; name one of {', '.join(names)}", param="model", code="missing")
        (model,) = _choose_names(names, None if query.model is None else [query.model])
        run = Run(self.storage, job, model)
        if query.points is None:
            return lambda: json_document(model, metric_lines(run, query.after))
        read_rows = self._histories.reader(run, query.points, query.after)
        return lambda: None if (rows := read_rows()) is None else json_document(model, rows)

    def logs(self, job: str, query: LogQuery, caller: Caller) -> ReadNew:
        """Return a function that reads the lines since its last call, and tells whether these are the last lines."""
        models = self._spec(job, caller).models
        chosen = _choose_names([model.name for model in models], query.model or None)
        _check_source(query.source, max(m.scaling.max_workers for m in models if m.name in chosen))
        runs = [Run(self.storage, job, model) for model in chosen]
        cursors: list[Cursor] = [{} for _ in runs]

        def read_new() -> tuple[Iterator[bytes], bool]:
            ended = all(map(_has_ended, runs))  # read first, so that the last lines are not missed
            streams = (shown_lines(run, query.source, cursor) for run, cursor in zip(runs, cursors, strict=True))
            return pack(text for _, text in merge(*streams)), ended

        return read_new

    def _check(self, body: bytes, caller: Caller, *, dry_run: bool) -> tuple[Checked, Queue]:
        """Parse and check a spec; return it with what the dispatcher has written of the cluster."""
        datasets = added.Kinds(self.storage, caller.may_use_dataset)
        spec = parse_spec(body, "spec", datasets=datasets, paths=False)
        caller.require(model.name for model in spec.models)
        caller.require(filter(None, (model.train.init_from for model in spec.models)))
        queue = self.views.queue()
        spec = resolve_references(spec, self.storage, pin=False)
        pools = self._pools.read().memory
        checked = check_job(
            spec,
            self.storage,
            capacity=queue.capacity,
            pools=pools,
            worker_memory=queue.worker_memory,
            planned=dry_run,
        )
        return checked, queue

    def _choose_runs(self, job: str, models: list[str] | None, caller: Caller) -> _Chosen:
        """Read a job, and the status of the named runs, by default all. A request reads nothing else of the job."""
        spec = self._spec(job, caller)
        entry = self.jobs.entry(job)  # raises JobNotFound for a job of `genmodels run`, which is not dispatched
        runs = [Run(self.storage, job, name) for name in _choose_names([model.name for model in spec.models], models)]
        return _Chosen(entry, spec, [(run, run.status()[0]) for run in runs])

    def _view(self, chosen: _Chosen) -> JobView:
        return self.views.one(chosen.entry, chosen.spec, {run.model: status for run, status in chosen.runs})

    def _spec(self, job: str, caller: Caller) -> JobSpec:
        """Read a job's spec; raise RequestError if the caller may not see the job."""
        spec = self.jobs.spec(job)
        caller.require_job(model.name for model in spec.models)
        return spec


@contextlib.contextmanager
def _spec_errors() -> Iterator[None]:
    """Answer 400 to a wrong spec."""
    try:
        yield
    except SpecError as error:
        raise RequestError(str(error), param=_field_of(error), code="invalid_spec") from None


def _choose_names(names: list[str], models: Iterable[str] | None) -> list[str]:
    for model in models or ():
        if model not in names:
            known = f"this job has {', '.join(names)}{nearest(model, names)}"
            raise RequestError(f"got {show(model)}; {known}", param="model", status=404, code="model_not_found")
    return [name for name in names if models is None or name in models]


def _check_source(source: str | None, workers: int) -> None:
    if source in (None, "driver") or int(source or 0) < workers:
        return
    ranks = "worker 0" if workers == 1 else f"the workers 0 to {workers - 1}"
    message = f"got {show(source)}; expected driver, or {ranks}"
    raise RequestError(f"source: {message}", param="source", status=404, code="source_not_found")


def _has_ended(run: Run) -> bool:
    """Return whether no more output follows; a run whose status is damaged is not continued."""
    try:
        return run.status()[0].state in ENDED
    except DamagedObject:
        return True


def _field_of(error: SpecError) -> str | None:
    """Return the field of the first error: `models[0].train.seed` of `spec:3: models[0].train.seed: ...`."""
    match = re.match(r"(?:spec:(?:\d+:)? )?([a-z]\w*(?:[.\[][^:\s]{1,200})?): ", error.problems[0])
    return match[1] if match else None
