"""Dispatch the queue in storage: the dispatcher with the lease starts, watches, preempts and ends all runs.

The dispatcher holds no state that is not in storage. A new dispatcher reads the open jobs, stamps its lease term
into the status of each run, so that the old dispatcher can no longer write a state, and continues. People send
commands, drivers write heartbeats and results; only the dispatcher writes states.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from genmodels.errors import (
    DamagedObject,
    GenmodelsError,
    JobNotFound,
    KeyNotFound,
    LeaseLost,
    StorageUnavailable,
    contained,
)
from genmodels.registry.catalogue_keeper import CatalogueKeeper
from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import delete_notification, notifications
from genmodels.runs.records import ENDED
from genmodels.runs.store import Run
from genmodels.storage import Storage
from genmodels.storage.documents import now
from genmodels.storage.lease import Lease
from genmodels.threads import Rounds
from services.dispatch.backends.base import Backend
from services.dispatch.queue import ManagedRun, RunQueue
from services.dispatch.supervisor import Supervisor

POLL_SECONDS = 1.0
REST_SECONDS = 2.0  # between two looks while there is no run
READS_A_SECOND = 100  # of heartbeats, and in a round: with more runs, a run that simply trains is read less often
MAX_READERS = 16  # jobs or runs that are read at once
MAX_SILENCES = 5  # looks at a run for which the store does not answer; then the other runs continue without it
RETRY_SECONDS = 15.0  # between two looks at a job that could not be read

ThingT = TypeVar("ThingT")
ResultT = TypeVar("ResultT")

log = logging.getLogger("genmodels.dispatch")


class Dispatcher:
    """Call `run` in a thread. Several dispatchers may use one storage: only the holder of the lease dispatches."""

    def __init__(self, storage: Storage, backend: Backend, lease: Lease | None = None) -> None:
        self.storage, self.backend, self.lease = storage, backend, lease or Lease(storage)
        self.jobs = Jobs(storage)
        self.queue = RunQueue(self.jobs, backend)
        self._threads = ThreadPoolExecutor(MAX_READERS, "dispatch")
        self._runs: dict[str, ManagedRun] = {}  # by job/model
        self._notified: list[tuple[str, str, str]] = []  # notifications of this round
        self._holds_lease: Callable[[], bool] = lambda: True
        self._unreadable: dict[str, float] = {}  # jobs that cannot be read completely, and when to read them again
        self._logged_errors: dict[str, str] = {}  # by job or run
        self._silences: Counter[str] = Counter()  # by job or run
        self.rounds = Rounds("dispatch", log, lasting=True)
        self._renewals = Rounds("lease", log)
        self._outage = ""  # why nothing could be dispatched at the last look

    def run(self, stop: threading.Event) -> None:
        """Dispatch while this process holds the lease, until `stop` is set; runs continue without a dispatcher."""
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
            log.warning("the lease was not released, so the next dispatcher waits until it expires: %s", error)

    def stalled(self) -> str | None:
        """Return why nothing is dispatched, or nothing is known of the runs, for long; None if all is well."""
        return self.rounds.stalled() or self.backend.stalled()

    def dispatch_once(self, lease_term: int) -> None:
        """Look at everything once.

        Raises:
            LeaseLost: another dispatcher has taken over.
        """
        try:
            self._adopt_jobs(lease_term)
            self._read_notifications(lease_term)
            self._look()
            for run in list(self._runs.values()):
                self._step(run)
            self._delete_notifications()
            self._close_jobs()
            self.queue.schedule(self._runs, self._step, self._holds_lease)
            self._log_recovery()
        except StorageUnavailable as error:
            self._log_outage(error)

    # The lease

    def _acquire(self) -> int | None:
        try:
            lease_term = self.lease.try_acquire(self._highest_term)
            self._log_recovery()
            return lease_term
        except StorageUnavailable as error:
            self._log_outage(error)
            return None

    def _highest_term(self) -> int:
        """Return the highest lease term in the statuses of open runs. A damaged status does not count.

        The status of an ended run is read when the run is resumed: see `Lease.outgrow`.
        """
        return max((term for terms in self._for_each(self._terms, self.jobs.open()) for term in terms), default=0)

    def _terms(self, job: str) -> list[int]:
        terms: list[int] = []
        with contextlib.suppress(JobNotFound, DamagedObject):
            for model in self.jobs.spec(job).models:
                with contextlib.suppress(DamagedObject):
                    terms.append(Run(self.storage, job, model.name).status()[0].lease_term)
        return terms

    def _hold(self, lease_term: int, stop: threading.Event) -> None:
        for of_the_last_term in (self._runs, self._unreadable, self._logged_errors):
            of_the_last_term.clear()
        self.queue.reset()
        self._holds_lease = self.lease.held
        over = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(over,), name="lease", daemon=True)
        renewer.start()
        try:
            with CatalogueKeeper(self.storage).running():
                while not stop.is_set() and not over.is_set() and self.lease.held():
                    with self.rounds.round(LeaseLost):
                        self.dispatch_once(lease_term)
                    stop.wait(POLL_SECONDS if self._runs else REST_SECONDS)
        except LeaseLost as lost:
            self.lease.outgrow(lost.lease_term)
            log.warning("%s", lost)
        finally:
            over.set()
            renewer.join()

    def _renew(self, over: threading.Event) -> None:
        """Renew the lease in a thread of its own: with a slow store a round may take longer than the lease."""
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

    def _adopt_jobs(self, lease_term: int) -> None:
        """Take over the runs of jobs that are new, or could not be read before."""
        known = {run.job for run in self._runs.values()} - self._unreadable.keys()
        new = [job for job in self.jobs.open() if job not in known and self._is_readable(job)]
        for runs in self._for_each(lambda job: self._adopt_job(job, lease_term), new):
            self._runs |= runs

    def _adopt_job(self, job: str, lease_term: int) -> dict[str, ManagedRun]:
        """Take over the runs of a job, except runs that are managed already or cannot be read."""
        try:
            spec, entry = self.jobs.spec(job), self.jobs.entry(job)
            self._unreadable.pop(job, None)
            runs = {}
            for place, model in enumerate(spec.models):
                run = Run(self.storage, job, model.name)
                if run.name not in self._runs and (supervisor := self._adopt_run(run, lease_term)):
                    runs[run.name] = ManagedRun(model, spec.priority, (entry.submitted, place), supervisor)
            self._silences.pop(job, None)
            return runs
        except (JobNotFound, KeyNotFound):
            return {}  # its submission is not complete yet
        except LeaseLost:
            raise
        except StorageUnavailable as error:
            self._count_silence(job, error)
            return {}
        except Exception as error:  # a damaged object of one job does not stop other jobs
            self._mark_unreadable(job, job, error)
            return {}

    def _adopt_run(self, run: Run, lease_term: int) -> Supervisor | None:
        """Return the supervisor of a run; None if its status cannot be read: then its job stays open."""
        try:
            supervisor = Supervisor(run, self.backend, *run.status())
            supervisor.stamp(lease_term)
            supervisor.commands_pending = False  # a command that was not applied still has its notification
            return supervisor
        except (LeaseLost, StorageUnavailable):
            raise
        except Exception as error:
            self._mark_unreadable(run.job, run.name, error)
            return None

    def _read_notifications(self, lease_term: int) -> None:
        """Note which runs have new commands."""
        self._notified = notifications(self.storage)
        for job, model, _ in self._notified:
            try:
                if f"{job}/{model}" not in self._runs and self._is_readable(job) and self.jobs.exists(job):
                    with contextlib.suppress(JobNotFound):  # a job of `genmodels run`, or deleted just now
                        self.jobs.reopen(job)  # an ended job: a command may resume a run of it
                        self._runs |= self._adopt_job(job, lease_term)
            except DamagedObject as error:  # the command is applied when the job can be read again
                self._mark_unreadable(job, job, error)
            if run := self._runs.get(f"{job}/{model}"):
                run.supervisor.commands_pending = True

    def _delete_notifications(self) -> None:
        """Delete the notifications whose commands are applied; a dispatcher that takes over reads the others.

        A command that was sent meanwhile has a notification of its own.
        """
        for job, model, notification in self._notified:
            run = self._runs.get(f"{job}/{model}")
            if not run.supervisor.commands_pending if run else job not in self._unreadable:
                delete_notification(self.storage, job, model, notification)

    def _is_readable(self, job: str) -> bool:
        """Return False while the next look at a job that could not be read is not due."""
        return self._unreadable.get(job, 0.0) <= time.monotonic()

    def _look(self) -> None:
        """Read what the steps of all runs decide by, many at once: only the writes are made one after the other.

        A run that cannot be read is read again in its step, which handles the error.
        """
        no_answer = threading.Event()

        def look(supervisor: Supervisor) -> None:
            if no_answer.is_set():
                return
            try:
                supervisor.look()
            except StorageUnavailable:
                no_answer.set()  # each of the other runs would wait as long
            except Exception as error:
                log.debug("%s cannot be read: %s", supervisor.run.name, error)

        active = [run.supervisor for run in self._runs.values() if run.supervisor.active]
        self._bound_reads(active)
        self._for_each(look, active)

    def _bound_reads(self, active: list[Supervisor]) -> None:
        """Let a round read the heartbeats of few runs that simply train: of those that are due for longest.

        So a round ends soon, however many became due during the round before.
        """
        rest = len(active) / READS_A_SECOND
        for supervisor in active:
            supervisor.rest_seconds = rest if rest > POLL_SECONDS else 0.0
            supervisor.postponed = False
        if len(active) <= READS_A_SECOND:
            return
        waiting = [(due, place) for place, supervisor in enumerate(active) if (due := supervisor.next_read) is not None]
        for _, place in sorted(waiting)[READS_A_SECOND:]:
            active[place].postponed = True

    def _step(self, run: ManagedRun, start_with: int = 0) -> None:
        """Do one step of a run.

        Args:
            start_with: start it first, with so many workers; 0: do not start it.
        """
        name = run.supervisor.run.name
        try:
            if start_with:
                run.supervisor.start(start_with)
            run.supervisor.step()
            self._silences.pop(name, None)
            self._logged_errors.pop(name, None)
        except LeaseLost:
            raise
        except StorageUnavailable as error:
            self._count_silence(name, error)
        except Exception as error:  # an error of one run does not stop other runs
            self._log_error(name, error)

    def _close_jobs(self) -> None:
        """Close the jobs whose runs have all ended.

        A job with an unreadable run stays open, because that run may not have ended.
        """
        jobs: dict[str, list[Supervisor]] = {}
        for run in self._runs.values():
            jobs.setdefault(run.job, []).append(run.supervisor)
        for job, supervisors in jobs.items():
            have_ended = all(each.status.state in ENDED and not each.commands_pending for each in supervisors)
            # The lease is checked right before: no lease term guards the index.
            if job not in self._unreadable and have_ended and self._holds_lease():
                self._close_job(job, supervisors)

    def _close_job(self, job: str, supervisors: list[Supervisor]) -> None:
        ended = max((change.time for each in supervisors for change in each.status.history[-1:]), default=now())
        try:
            self.jobs.close(job, ended, {each.run.model: each.status.state for each in supervisors})
        except StorageUnavailable:
            raise
        except Exception as error:  # a damaged index of one job
            self._log_error(job, error)
            return
        for each in supervisors:
            del self._runs[each.run.name]

    def _for_each(self, do: Callable[[ThingT], ResultT], things: Iterable[ThingT]) -> list[ResultT]:
        """Do it for all, many at once. After an error begin no more, wait for those that run, and raise it."""
        futures = [self._threads.submit(do, thing) for thing in things]
        waiting = wait(futures, return_when=FIRST_EXCEPTION).not_done
        wait([future for future in waiting if not future.cancel()])
        return [future.result() for future in futures if not future.cancelled()]

    # Errors and outages

    def _mark_unreadable(self, job: str, name: str, error: Exception) -> None:
        self._unreadable[job] = time.monotonic() + RETRY_SECONDS
        self._log_error(name, error)

    def _log_error(self, name: str, error: Exception) -> None:
        """Log once why a job or run stands still. A damaged object was logged when it was read."""
        if isinstance(error, DamagedObject):
            return
        message = str(contained(error))
        if self._logged_errors.get(name) != message:
            trace = None if isinstance(error, GenmodelsError) else error
            log.error("%s is skipped for now: %s", name, message, exc_info=trace)
        self._logged_errors[name] = message

    def _count_silence(self, name: str, error: StorageUnavailable) -> None:
        """Raise, unless the store has not answered for this job or run several times in a row."""
        self._silences[name] += 1
        if self._silences[name] < MAX_SILENCES:
            raise error
        log.warning("%s is skipped: %s", name, error)

    def _log_outage(self, error: StorageUnavailable) -> None:
        """Log once for each kind of outage why nothing is dispatched."""
        if error.reason != self._outage:
            log.warning("nothing is dispatched for now, because %s: %s", error.reason, error)
        self._outage = error.reason

    def _log_recovery(self) -> None:
        if self._outage:
            log.info("dispatching again")
        self._outage = ""
