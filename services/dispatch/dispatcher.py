"""From the queue in storage to drivers: one leased dispatcher starts, watches, preempts and ends all runs.

The dispatcher holds no state that is not in storage. A new one reads the open jobs, stamps its lease term into the
status of each run, so that the old one can no longer write a state, and continues. People send commands, drivers write
heartbeats and results; only the dispatcher writes states.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from genmodels.errors import (
    DamagedObject,
    GenmodelsError,
    JobNotFound,
    KeyNotFound,
    LeaseLost,
    StorageUnavailable,
    contained,
)
from genmodels.runs.jobs import Jobs, Queue, QueuedRun
from genmodels.runs.records import ENDED
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage
from genmodels.storage.documents import now
from genmodels.storage.lease import Lease
from genmodels.threads import Rounds
from services.cluster.settings import settings
from services.dispatch.backends.base import Backend, Capacity
from services.dispatch.scheduler import Plan, Queued, Running, plan
from services.dispatch.supervisor import Supervisor

POLL_SECONDS = 1.0
CAPACITY_SECONDS = 2.0  # how long what the cluster said of itself is believed
KEEP_SECONDS = 15.0  # a run that backs off for no longer keeps its place
ADOPTED_AT_ONCE = 16
SILENCES = 5  # looks at a run that the store, which else answers, leaves unanswered: then the others go on without it
RETRY_SECONDS = 15.0  # between two looks at what could not be read of a job
SHOW_SECONDS = 30.0  # after which the queue is written again, though nothing has changed: it may have been damaged

log = logging.getLogger("genmodels.dispatch")


@dataclass
class _Carried:
    """A run of an open job."""

    spec: ModelSpec
    priority: int
    submitted: tuple[str, int]
    supervisor: Supervisor
    backfilled: int = 0
    room_since: float | None = None  # to grow

    @property
    def job(self) -> str:
        return self.supervisor.run.job


class Dispatcher:
    """`run` it in a thread; any number may run against one store, one of them works."""

    def __init__(self, storage: Storage, backend: Backend, lease: Lease | None = None) -> None:
        self.storage, self.backend, self.lease = storage, backend, lease or Lease(storage)
        self.jobs = Jobs(storage)
        self._runs: dict[str, _Carried] = {}  # by job/model
        self._capacity: tuple[float, Capacity | None] = (-CAPACITY_SECONDS, None)
        self._holds: Callable[[], bool] = lambda: True
        self._left_out: dict[str, float] = {}  # jobs of which something cannot be read, and when to look again
        self._complaints: dict[str, str] = {}  # what was logged last, by job or run
        self._silences: Counter[str] = Counter()
        self._shown: tuple[float, Any] = (-SHOW_SECONDS, None)  # when, and what
        self.rounds = Rounds("dispatch", log, lasting=True)
        self._renewals = Rounds("lease", log)
        self._trouble = ""  # why nothing could be dispatched at the last look

    def run(self, stop: threading.Event) -> None:
        """Dispatch whenever the lease can be had, until `stop` is set; runs go on without a dispatcher."""
        while not stop.is_set():
            with self.rounds.round():
                lease_term = self._acquire()
                if lease_term is not None:
                    log.info("this dispatcher holds the lease, term %d", lease_term)
                    self._hold(lease_term, stop)
            stop.wait(POLL_SECONDS)
        try:
            self.lease.release()
        except GenmodelsError as error:
            log.warning("the lease was not given back, so the next dispatcher waits for its end: %s", error)

    def dispatch_once(self, lease_term: int) -> None:
        """Look at everything once.

        Raises:
            LeaseLost: another dispatcher has taken over.
        """
        try:
            self._adopt(lease_term)
            self._hear(lease_term)
            for run in list(self._runs.values()):
                self._step(run)
            self._close()
            self._schedule()
            self._answered()
        except StorageUnavailable as error:
            self._away(error)

    def _acquire(self) -> int | None:
        try:
            lease_term = self.lease.try_acquire(self._highest_stamped)
            self._answered()
            return lease_term
        except StorageUnavailable as error:
            self._away(error)
            return None

    def _highest_stamped(self) -> int:
        """The highest lease term in the statuses of open runs. A damaged status is left alone: its term does not count.

        Statuses of ended runs are met one by one, when somebody resumes them: see `Lease.outgrow`.
        """
        with ThreadPoolExecutor(ADOPTED_AT_ONCE) as threads:
            return max(
                (
                    lease_term
                    for lease_terms in threads.map(self._lease_terms, self.jobs.open())
                    for lease_term in lease_terms
                ),
                default=0,
            )

    def _lease_terms(self, job: str) -> list[int]:
        found: list[int] = []
        with contextlib.suppress(JobNotFound, DamagedObject):
            for model in self.jobs.spec(job).models:
                with contextlib.suppress(DamagedObject):
                    found.append(Run(self.storage, job, model.name).status()[0].lease_term)
        return found

    def _hold(self, lease_term: int, stop: threading.Event) -> None:
        for of_the_last_hold in (self._runs, self._left_out, self._complaints):
            of_the_last_hold.clear()
        self._shown, self._holds = (-SHOW_SECONDS, None), self.lease.held
        over = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(over,), name="lease", daemon=True)
        renewer.start()
        try:
            while not stop.is_set() and not over.is_set() and self.lease.held():
                with self.rounds.round(LeaseLost):
                    self.dispatch_once(lease_term)
                stop.wait(POLL_SECONDS)
        except LeaseLost as lost:
            self.lease.outgrow(lost.lease_term)
            log.warning("%s", lost)
        finally:
            over.set()
            renewer.join()

    def _renew(self, over: threading.Event) -> None:
        """Beside the ticks, which a slow store may make long."""
        while not over.wait(self.lease.seconds / 4):
            with self._renewals.round():
                try:
                    self.lease.renew()
                except LeaseLost as lost:
                    log.warning("%s", lost)
                    over.set()
                except StorageUnavailable as error:
                    log.debug("the lease was not renewed: %s", error)

    # Jobs

    def _adopt(self, lease_term: int) -> None:
        known = {run.job for run in self._runs.values()} - self._left_out.keys()
        due = time.monotonic()
        new = [job for job in self.jobs.open() if job not in known and self._left_out.get(job, due) <= due]
        if not new:
            return
        with ThreadPoolExecutor(ADOPTED_AT_ONCE) as threads:
            for carried in threads.map(lambda job: self._read(job, lease_term), new):
                self._runs |= carried

    def _read(self, job: str, lease_term: int) -> dict[str, _Carried]:
        """Take over the runs of a job, but for those that are carried already or cannot be read."""
        try:
            spec, entry = self.jobs.spec(job), self.jobs.entry(job)
            self._left_out.pop(job, None)
            found = {}
            for place, model in enumerate(spec.models):
                run = Run(self.storage, job, model.name)
                if run.name not in self._runs and (supervisor := self._take_over(run, lease_term)):
                    found[run.name] = _Carried(model, spec.priority, (entry.submitted, place), supervisor)
            self._silences.pop(job, None)
            return found
        except (JobNotFound, KeyNotFound):
            return {}  # its submission has not been brought to its end
        except LeaseLost:
            raise
        except StorageUnavailable as error:
            self._silent_about(job, error)
            return {}
        except Exception as error:  # a damaged object of one job stands in no other's way
            self._leave_out(job, job, error)
            return {}

    def _take_over(self, run: Run, lease_term: int) -> Supervisor | None:
        """None: its status cannot be read, so the run is left alone, and its job stays open."""
        try:
            supervisor = Supervisor(run, self.backend, *run.status())
            supervisor.stamp(lease_term)
            # Looked up here, where jobs are read in parallel; who leaves a command later notifications the dispatcher.
            supervisor.commands_pending = bool(run.commands(after=supervisor.status.last_command))
            return supervisor
        except (LeaseLost, StorageUnavailable):
            raise
        except Exception as error:
            self._leave_out(run.job, run.name, error)
            return None

    def _leave_out(self, job: str, name: str, error: Exception) -> None:
        self._left_out[job] = time.monotonic() + RETRY_SECONDS
        self._complain(name, error)

    def _hear(self, lease_term: int) -> None:
        """Have runs look at commands of which we were told."""
        for job, model, notification in self.jobs.notifications():
            try:
                if f"{job}/{model}" not in self._runs and self.jobs.exists(job):
                    with contextlib.suppress(JobNotFound):  # one of `genmodels run`, or deleted just now
                        self.jobs.reopen(job)  # an ended job, whose runs somebody may want to resume
                        self._runs |= self._read(job, lease_term)
            except DamagedObject as error:  # the command is heard when the job can be read again
                self._leave_out(job, job, error)
            self.jobs.delete_notification(
                job, model, notification
            )  # first: a command sent meanwhile has a notification of its own
            if run := self._runs.get(f"{job}/{model}"):
                run.supervisor.commands_pending = True

    def _step(self, run: _Carried, start_with: int = 0) -> None:
        """Carry a run on, after a start with so many workers if that is given."""
        name = run.supervisor.run.name
        try:
            if start_with:
                run.supervisor.start(start_with)
            run.supervisor.step()
            self._silences.pop(name, None)
            self._complaints.pop(name, None)
        except LeaseLost:
            raise
        except StorageUnavailable as error:
            self._silent_about(name, error)
        except Exception as error:  # one run's trouble is no other's
            self._complain(name, error)

    def _complain(self, name: str, error: Exception) -> None:
        """Log why a job or run is not carried on for now, once; a damaged object was logged when it was read."""
        if isinstance(error, DamagedObject):
            return
        said = str(contained(error))
        if self._complaints.get(name) != said:
            trace = None if isinstance(error, GenmodelsError) else error
            log.error("%s is left alone for now: %s", name, said, exc_info=trace)
        self._complaints[name] = said

    def _close(self) -> None:
        jobs: dict[str, list[Supervisor]] = {}
        for run in self._runs.values():
            jobs.setdefault(run.job, []).append(run.supervisor)
        for job, supervisors in jobs.items():
            if job in self._left_out:  # a run of it that cannot be read may not have ended
                continue
            ended_all = all(each.status.state in ENDED and not each.commands_pending for each in supervisors)
            if ended_all and self._holds():  # asked right before: no lease term guards the index
                changes = (change.time for each in supervisors for change in each.status.history[-1:])
                ended = max(changes, default=now())
                try:
                    self.jobs.close(job, ended, {each.run.model: each.status.state for each in supervisors})
                except StorageUnavailable:
                    raise
                except Exception as error:  # a damaged index of one job
                    self._complain(job, error)
                    continue
                for each in supervisors:
                    del self._runs[each.run.name]

    # The queue

    def _schedule(self) -> None:
        queued = [self._queued(key, run) for key, run in self._runs.items() if run.supervisor.waits]
        active = [self._running(key, run) for key, run in self._runs.items() if run.supervisor.active]
        capacity = self._ask_capacity()
        if capacity is None:
            in_order = sorted(queued, key=lambda run: (-run.priority, run.submitted))
            waiting = [(run.key, run.hold_reason or "the cluster does not answer") for run in in_order]
            self._show(None, waiting)
            return
        todo = plan(queued, active, capacity)
        for key, workers in todo.starts:
            self._step(self._runs[key], workers)
        for key, reason in todo.preemptions:
            self._runs[key].supervisor.request_stop(reason)
        for key in todo.backfilled:
            self._runs[key].backfilled += 1
        self._grow(todo)
        self._show(capacity, todo.reasons)

    def _queued(self, key: str, run: _Carried) -> Queued:
        pause = run.supervisor.seconds_to_wait
        hold_reason = "backs off after a failure" if pause else ""
        sizes, use_gpu = run.spec.world_sizes, run.spec.scaling.use_gpu
        keeps = 0 < pause <= KEEP_SECONDS  # or another would start, only to be preempted
        return Queued(key, run.priority, run.submitted, sizes, use_gpu, run.backfilled, hold_reason, keeps)

    def _running(self, key: str, run: _Carried) -> Running:
        status, beat = run.supervisor.status, run.supervisor.heartbeat
        growable = bool(
            status.state == "running" and beat and (beat.seconds_left or 0.0) > settings().grow_worth_seconds
        )
        return Running(
            key,
            run.priority,
            since=next((change.time for change in reversed(status.history) if change.state == "starting"), ""),
            sizes=run.spec.world_sizes,
            workers=status.workers,
            use_gpu=run.spec.scaling.use_gpu,
            stopping=run.supervisor.stopping,
            growable=growable,
            placed=status.state != "starting",
        )

    def _grow(self, todo: Plan) -> None:
        """Let runs grow into room that has been there for a while: each growth costs a restart."""
        growing = dict(todo.grows)
        for key, run in self._runs.items():
            if key not in growing:
                run.room_since = None
            elif run.room_since is None:
                run.room_since = time.monotonic()
            elif time.monotonic() - run.room_since >= settings().grow_seconds:
                run.room_since = None
                run.supervisor.request_stop(growing[key])

    def _ask_capacity(self) -> Capacity | None:
        asked, known = self._capacity
        if time.monotonic() - asked >= CAPACITY_SECONDS:
            known = self.backend.capacity()
            self._capacity = time.monotonic(), known
        return known

    def _show(self, capacity: Capacity | None, waiting: list[tuple[str, str]]) -> None:
        """Leave the order of the queue, and why each waits, for whoever asks."""
        names = ((*key.split("/"), reason) for key, reason in waiting)
        queue = [QueuedRun(job=job, model=model, reason=reason) for job, model, reason in names]
        has = None
        if capacity and not capacity.unlimited:
            has = {"cpus": max(capacity.cpus, capacity.max_cpus), "gpus": max(capacity.gpus, capacity.max_gpus)}
        at, shown = self._shown
        if (shown != (has, queue) or time.monotonic() - at >= SHOW_SECONDS) and self._holds():
            self.jobs.write_queue(Queue(time=now(), capacity=has, queue=queue))
            self._shown = time.monotonic(), (has, queue)

    def _silent_about(self, name: str, error: StorageUnavailable) -> None:
        """Raise, unless that is all that the store has kept silent about for a while."""
        self._silences[name] += 1
        if self._silences[name] < SILENCES:
            raise error
        log.warning("%s: passed over: %s", name, error)

    def _away(self, error: StorageUnavailable) -> None:
        """Log, once for each kind of outage, why nothing is dispatched for now."""
        if error.reason != self._trouble:
            log.warning("nothing is dispatched for now, because %s: %s", error.reason, error)
        self._trouble = error.reason

    def _answered(self) -> None:
        if self._trouble:
            log.info("dispatching again")
        self._trouble = ""
