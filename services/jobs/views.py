"""Jobs as the API shows them, read from the objects that the dispatcher and the drivers leave in the storage."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from genmodels.errors import DamagedObject, JobNotFound, KeyNotFound
from genmodels.runs.jobs import EndedEntry, Entry, Jobs
from genmodels.runs.queue import Queue, read_queue
from genmodels.runs.records import ENDED, Status
from genmodels.runs.store import Run
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage
from services.http.responses import finite
from services.jobs.schemas import JobView, Page, RunView, ShownState

READERS = 16  # objects read at the same time
MAX_CACHED = 4096  # specs, and index entries, kept in memory: they never change

T = TypeVar("T")


class Views:
    """Read jobs, in parallel; thread-safe.

    Args:
        endpoint: URL of the gateway that serves what the jobs publish.
    """

    def __init__(self, storage: Storage, endpoint: str | None = None) -> None:
        self.storage, self.jobs, self.endpoint = storage, Jobs(storage), endpoint
        self._threads = ThreadPoolExecutor(READERS, "views")
        self._specs: OrderedDict[str, JobSpec] = OrderedDict()
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def job(self, job: str) -> JobView:
        """Read one job in full.

        Raises:
            JobNotFound
            DamagedObject: the spec or the index entry. A damaged object of a run is shown with that run instead.
        """
        return self.one(self.jobs.entry(job), self.jobs.spec(job))

    def one(self, entry: Entry, spec: JobSpec, statuses: Mapping[str, Status] | None = None) -> JobView:
        """Build the full view of a job whose index entry and spec were read already.

        Args:
            statuses: by model, statuses that were read already; the others are read here.
        """
        (view,) = self._views([entry], [spec], statuses)
        return view.model_copy(update={"endpoint": self.endpoint})

    def submitted(self, entry: Entry, spec: JobSpec, notes: list[str]) -> JobView:
        """Build the view of a job that was submitted just now: all its runs are queued."""
        runs = [RunView(model=model.name, state="queued", **_spec_fields(model)) for model in spec.models]
        return _view(entry, runs).model_copy(update={"notes": notes, "endpoint": self.endpoint})

    def page(self, kind: str, limit: int, after: str, may_see: Callable[[Sequence[str]], bool]) -> Page:
        """Read one page of jobs; jobs with a damaged index entry are left out.

        Args:
            kind: "open", "ended" or "all".
            after: the `next` of the page before; "" for the first page.
            may_see: return whether the caller may see jobs with these models.
        """
        index, _, mark = after.partition("!")
        views: list[JobView] = []
        open_now: set[str] = set()
        if kind != "ended" and index != "ended":
            entries = self._open()
            open_now = {entry.job for entry in entries}
            chosen = [entry for entry in entries if (not mark or _order(entry) < mark) and may_see(entry.models)]
            views, mark = self._summary(chosen[:limit]), ""
            if len(chosen) > limit:
                return Page(data=views, next=f"open!{_order(chosen[limit - 1])}")
        if kind == "open":
            return Page(data=views)
        ended = self.jobs.ended(mark, limit + 1 - len(views))  # one more, to know whether there are more
        shown = ended[: limit - len(views)]
        more = len(ended) > len(shown)
        if more:
            mark = shown[-1][0] if shown else mark
        # a job that is being closed is in both indexes for a moment
        views += [_from_index(entry) for _, entry in shown if entry.job not in open_now and may_see(entry.models)]
        return Page(data=views, next=f"ended!{mark}" if more else None)

    def open_runs(self) -> list[tuple[str, Status | None]]:
        """Return the name (job/model) and the status of every run of an open job; None: the status is damaged.

        Only one small object of each run is read.
        """
        jobs = [entry for entry in self._open() if entry.job in self._specs or self.jobs.exists(entry.job)]
        runs = [Run(self.storage, entry.job, model) for entry in jobs for model in entry.models]
        statuses = self._threads.map(_status, runs)
        return [(run.name, status) for run, status in zip(runs, statuses, strict=True)]

    def queue(self) -> Queue:
        """Read the queue that the dispatcher wrote last."""
        return read_queue(self.storage)

    def _open(self) -> list[Entry]:
        """Read the index entries of the open jobs, newest first."""
        entries = [entry for entry in self._threads.map(self._entry, self.jobs.open()) if entry]
        return sorted(entries, key=_order, reverse=True)

    def _entry(self, job: str) -> Entry | None:
        try:
            return _cached(self._entries, job, lambda: self.jobs.entry(job))
        except (JobNotFound, DamagedObject):  # JobNotFound: the job has ended, or is not fully submitted
            return None

    def _summary(self, entries: Sequence[Entry]) -> list[JobView]:
        """Read open jobs; jobs that are deleted in this moment are left out."""
        if not entries:
            return []
        specs = list(zip(entries, self._threads.map(self._spec, [entry.job for entry in entries]), strict=True))
        sound = [(entry, spec) for entry, spec in specs if isinstance(spec, JobSpec)]
        views = {view.job: view for view in self._views([entry for entry, _ in sound], [spec for _, spec in sound])}
        views |= {entry.job: _unreadable(entry, spec) for entry, spec in specs if isinstance(spec, DamagedObject)}
        return [views[entry.job] for entry in entries if entry.job in views]

    def _spec(self, job: str) -> JobSpec | DamagedObject | None:
        try:
            return _cached(self._specs, job, lambda: self.jobs.spec(job))
        except (JobNotFound, KeyNotFound):
            return None
        except DamagedObject as error:
            return error

    def _views(
        self, entries: Sequence[Entry], specs: Sequence[JobSpec], statuses: Mapping[str, Status] | None = None
    ) -> list[JobView]:
        queue = self.queue().queue
        waiting = {(item.job, item.model): place for place, item in enumerate(queue)}
        todo = [(entry.job, model) for entry, spec in zip(entries, specs, strict=True) for model in spec.models]

        def read(item: tuple[str, ModelSpec]) -> RunView:
            job, model = item
            return _run_view(Run(self.storage, job, model.name), model, (statuses or {}).get(model.name))

        runs = iter(self._threads.map(read, todo))
        views = []
        for entry, spec in zip(entries, specs, strict=True):
            run_views = [next(runs) for _ in spec.models]
            for run in run_views:
                place = waiting.get((entry.job, run.model))
                if run.state == "queued" and place is not None:
                    run.position, run.wait = place + 1, queue[place].reason
            views.append(_view(entry, run_views))
        return views


def job_state(states: Sequence[ShownState]) -> ShownState:
    """Return the state of a job from the states of its runs."""
    if any(state in ("starting", "running", "publishing") for state in states):
        return "running"
    worst: tuple[ShownState, ...] = ("queued", "damaged", "failed", "cancelled")
    return next((state for state in worst if state in states), "succeeded")


def _view(entry: Entry, runs: list[RunView]) -> JobView:
    state = job_state([run.state for run in runs])
    ended = max((run.history[-1].time for run in runs if run.history), default=None) if state in ENDED else None
    return JobView(
        job=entry.job,
        name=entry.name,
        priority=entry.priority,
        state=state,
        submitted=entry.submitted,
        ended=ended,
        models=runs,
    )


def _from_index(entry: EndedEntry) -> JobView:
    runs = [RunView(model=model, state=state) for model, state in entry.states.items()]
    return _view(entry, runs).model_copy(update={"ended": entry.ended})


def _unreadable(entry: Entry, error: DamagedObject) -> JobView:
    """Build the view of a job whose spec is damaged; the index entry names its models."""
    return _view(entry, [RunView(model=model, state="damaged", reason=str(error)) for model in entry.models])


def _status(run: Run) -> Status | None:
    with contextlib.suppress(DamagedObject):
        return run.status()[0]
    return None


def _run_view(run: Run, spec: ModelSpec, status: Status | None) -> RunView:
    """Build the view of a run; a status that was not read before is read here."""
    try:
        status = status or run.status()[0]
    except DamagedObject as error:
        return RunView(model=spec.name, state="damaged", reason=str(error), **_spec_fields(spec))
    view = RunView(
        model=spec.name,
        state=status.state,
        reason=status.reason,
        attempt=status.attempt,
        workers=status.workers,
        history=status.history,
        **_spec_fields(spec),
    )
    if not status.attempt:
        return view
    active = status.state not in ("queued", *ENDED)
    result = None if active else run.result(status.attempt)
    if result:
        view.step, view.version = result.step, result.version
        view.metrics = {name: finite(value) for name, value in result.metrics.items()}
    elif heartbeat := run.heartbeat(status.attempt):
        view.step, view.loss = heartbeat.step, finite(heartbeat.loss)
        if active:
            view.phase, view.seconds_left = heartbeat.phase, finite(heartbeat.seconds_left)
            view.waiting = heartbeat.waiting or None
    return view


def _spec_fields(spec: ModelSpec) -> dict[str, Any]:
    return {"family": spec.family, "max_steps": spec.train.max_steps, "alias": spec.serve.alias}


def _order(entry: Entry) -> str:
    return f"{entry.submitted} {entry.job}"


def _cached(cache: OrderedDict[str, T], key: str, make: Callable[[], T]) -> T:
    """Return a cached value, or make and cache it. The cache is bounded; two threads may make the same value."""
    value = cache.get(key)
    if value is None:
        value = cache[key] = make()
        while len(cache) > MAX_CACHED:
            cache.popitem(last=False)
    return value
