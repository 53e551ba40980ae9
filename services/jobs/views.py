"""A job as the API shows it: put together from what the dispatcher, the drivers and the queue left in storage."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from genmodels.errors import DamagedObject, JobNotFound, KeyNotFound
from genmodels.runs.jobs import EndedEntry, Entry, Jobs, Queue
from genmodels.runs.records import ENDED, Status
from genmodels.runs.store import Run
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage
from services.jobs.schemas import JobView, Page, RunView, ShownState

READERS = 16  # objects read at the same time
MAX_CACHED = 4096  # specs, and entries of the index, kept in memory: they never change

T = TypeVar("T")


class Views:
    """Reads in parallel, safe between threads.

    Args:
        endpoint: URL of the gateway that serves what the jobs publish.
    """

    def __init__(self, storage: Storage, endpoint: str | None = None) -> None:
        self.storage, self.jobs, self.endpoint = storage, Jobs(storage), endpoint
        self._threads = ThreadPoolExecutor(READERS, "views")
        self._specs: OrderedDict[str, JobSpec] = OrderedDict()
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def job(self, job: str) -> JobView:
        """One job with everything.

        Raises:
            JobNotFound
            DamagedObject: its spec or its entry in the index. What is damaged of a run is shown with that run.
        """
        entry = self.jobs.entry(job)
        (view,) = self._whole([entry], [self.jobs.spec(job)])
        return view.model_copy(update={"endpoint": self.endpoint})

    def submitted(self, entry: Entry, spec: JobSpec, notes: list[str]) -> JobView:
        """A job that has just come, which nobody has touched yet."""
        runs = [RunView(model=model.name, state="queued", **_plan(model)) for model in spec.models]
        return _view(entry, runs).model_copy(update={"notes": notes, "endpoint": self.endpoint})

    def page(self, kind: str, limit: int, after: str, may_see: Callable[[Sequence[str]], bool]) -> Page:
        """Some of the jobs, without those whose entry in the index is damaged.

        Args:
            kind: "open", "ended" or "all".
            after: the `next` of the page before; "" for the first.
            may_see: which models the caller may know of.
        """
        where, _, mark = after.partition("!")
        views: list[JobView] = []
        open_now: set[str] = set()
        if kind != "ended" and where != "ended":
            entries = self._open()
            open_now = {entry.job for entry in entries}
            chosen = [entry for entry in entries if (not mark or _order(entry) < mark) and may_see(entry.models)]
            views, mark = self._summary(chosen[:limit]), ""
            if len(chosen) > limit:
                return Page(data=views, next=f"open!{_order(chosen[limit - 1])}")
        if kind == "open":
            return Page(data=views)
        found = self.jobs.ended(mark, limit + 1 - len(views))  # one more, to know whether there are more
        shown = found[: limit - len(views)]
        more = len(found) > len(shown)
        if more:
            mark = shown[-1][0] if shown else mark
        # one that is being closed stands in both indexes for a moment
        views += [_from_index(entry) for _, entry in shown if entry.job not in open_now and may_see(entry.models)]
        return Page(data=views, next=f"ended!{mark}" if more else None)

    def open_runs(self) -> list[tuple[str, Status | None]]:
        """The runs of all open jobs, named job/model, as their statuses say: one small object of each is read.

        None stands for a status that is damaged.
        """
        jobs = [entry for entry in self._open() if entry.job in self._specs or self.jobs.exists(entry.job)]
        runs = [Run(self.storage, entry.job, model) for entry in jobs for model in entry.models]
        statuses = self._threads.map(_status, runs)
        return [(run.name, status) for run, status in zip(runs, statuses, strict=True)]

    def queue(self) -> Queue:
        """What the dispatcher says of the queue."""
        return self.jobs.queue()

    def _open(self) -> list[Entry]:
        """Entries of the open jobs, newest first."""
        entries = [entry for entry in self._threads.map(self._entry, self.jobs.open()) if entry]
        return sorted(entries, key=_order, reverse=True)

    def _entry(self, job: str) -> Entry | None:
        try:
            return _kept(self._entries, job, lambda: self.jobs.entry(job))
        except (JobNotFound, DamagedObject):  # JobNotFound: it has just ended, or its submission has not
            return None

    def _summary(self, entries: Sequence[Entry]) -> list[JobView]:
        """Views of open jobs, but for those that go in this moment."""
        if not entries:
            return []
        specs = list(zip(entries, self._threads.map(self._spec, [entry.job for entry in entries]), strict=True))
        sound = [(entry, spec) for entry, spec in specs if isinstance(spec, JobSpec)]
        views = {view.job: view for view in self._whole([entry for entry, _ in sound], [spec for _, spec in sound])}
        views |= {entry.job: _unreadable(entry, spec) for entry, spec in specs if isinstance(spec, DamagedObject)}
        return [views[entry.job] for entry in entries if entry.job in views]

    def _spec(self, job: str) -> JobSpec | DamagedObject | None:
        try:
            return _kept(self._specs, job, lambda: self.jobs.spec(job))
        except (JobNotFound, KeyNotFound):
            return None
        except DamagedObject as error:
            return error

    def _whole(self, entries: Sequence[Entry], specs: Sequence[JobSpec]) -> list[JobView]:
        queue = self.queue().queue
        waiting = {(item.job, item.model): place for place, item in enumerate(queue)}
        todo = [(entry.job, model) for entry, spec in zip(entries, specs, strict=True) for model in spec.models]
        runs = iter(self._threads.map(lambda one: _run(Run(self.storage, one[0], one[1].name), one[1]), todo))
        views = []
        for entry, spec in zip(entries, specs, strict=True):
            mine = [next(runs) for _ in spec.models]
            for run in mine:
                place = waiting.get((entry.job, run.model))
                if run.state == "queued" and place is not None:
                    run.position, run.wait = place + 1, queue[place].reason
            views.append(_view(entry, mine))
        return views


def job_state(states: Sequence[ShownState]) -> ShownState:
    """What a job's runs make of it."""
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
    """A job whose spec is damaged: its entry names its models."""
    return _view(entry, [RunView(model=model, state="damaged", reason=str(error)) for model in entry.models])


def _status(run: Run) -> Status | None:
    with contextlib.suppress(DamagedObject):
        return run.status()[0]
    return None


def _run(run: Run, spec: ModelSpec) -> RunView:
    try:
        status, _ = run.status()
    except DamagedObject as error:
        return RunView(model=spec.name, state="damaged", reason=str(error), **_plan(spec))
    view = RunView(
        model=spec.name,
        state=status.state,
        reason=status.reason,
        attempt=status.attempt,
        workers=status.workers,
        history=status.history,
        **_plan(spec),
    )
    if not status.attempt:
        return view
    active = status.state not in ("queued", *ENDED)
    result = None if active else run.result(status.attempt)
    if result:
        view.step, view.version = result.step, result.version
        view.metrics = {name: _finite(value) for name, value in result.metrics.items()}
    elif beat := run.heartbeat(status.attempt):
        view.step, view.loss = beat.step, _finite(beat.loss)
        if active:
            view.phase, view.seconds_left = beat.phase, _finite(beat.seconds_left)
            view.waiting = beat.waiting or None
    return view


def _plan(spec: ModelSpec) -> dict[str, Any]:
    return {"family": spec.family, "max_steps": spec.train.max_steps, "alias": spec.serve.alias}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _order(entry: Entry) -> str:
    return f"{entry.submitted} {entry.job}"


def _kept(cache: OrderedDict[str, T], key: str, make: Callable[[], T]) -> T:
    """Looked up in a bounded cache; threads may at worst make the same value twice."""
    found = cache.get(key)
    if found is None:
        found = cache[key] = make()
        while len(cache) > MAX_CACHED:
            cache.popitem(last=False)
    return found
