"""One run from queued to its end: starts attempts, watches them, and decides by class of failure what comes next.

A `Supervisor` alone writes the state of its run. Each write is a compare-and-swap, so of two that carry the same run
one stops at its next write; what an overtaken driver still writes stays outside the run's chain.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from datetime import datetime

from genmodels.errors import Conflict, LeaseLost, StorageUnavailable
from genmodels.metrics import ATTEMPTS, QUEUE_WAIT_SECONDS, RUNS_ENDED
from genmodels.runs.records import ENDED, Cause, Command, Heartbeat, Result, State, Status
from genmodels.runs.store import Run
from genmodels.storage import Storage
from genmodels.storage.disk import outage_of_disk
from genmodels.storage.retry import retry_until_available
from services.dispatch.attempt import LEAVE_SECONDS, _Attempt, _patience
from services.dispatch.backends.base import LOST, PREEMPTED, Backend, Watch

POLL_SECONDS = 0.5
BACK_OFF_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0)
MAX_NO_PROGRESS_ATTEMPTS = 3  # attempts in a row without a new checkpoint that end a run
MAX_OUT_OF_MEMORY_ATTEMPTS = 2  # that end a run; one may have been another process's doing
RETRIED: tuple[Cause, ...] = ("infrastructure", "superseded", "out of memory", "no workers", "storage")
UNCOUNTED: tuple[Cause, ...] = ("no workers", "storage")  # nothing was tried, or nothing could be saved
ACTIVE: tuple[State, ...] = ("starting", "running", "publishing")

log = logging.getLogger("genmodels.supervise")


class Supervisor:
    """Carries one run. Call `step` again and again.

    Where the store does not answer, methods raise StorageUnavailable, and the next `step` goes on from there; where
    somebody else has written the run's state they raise LeaseLost, and this supervisor is of no use any more.

    Attributes:
        status: as it stands in storage.
        heartbeat: the latest of the attempt.
        commands_pending: whether to look for new commands at the next step.
    """

    def __init__(
        self,
        run: Run,
        backend: Backend,
        status: Status,
        etag: str | None,
        watch: Watch = lambda status, heartbeat: None,
    ) -> None:
        self.run, self.backend, self.status, self.etag, self.watch = run, backend, status, etag, watch
        self.heartbeat: Heartbeat | None = None
        self.commands_pending = False
        self._unsettled: tuple[Status, str] | None = None  # a write that may or may not have happened, and its nonce
        self._attempt: _Attempt | None = None
        self._mine = 0  # the attempt that this supervisor starts, as against one it found started
        self._ended_by: str | None = None  # of an attempt whose end is not in storage yet
        self._ready_at = 0.0
        self._waits = 0

    @property
    def active(self) -> bool:
        return self.status.state in ACTIVE

    @property
    def waits(self) -> bool:
        """Whether it is queued for certain: the store has answered its last write."""
        return self.status.state == "queued" and self._unsettled is None

    @property
    def stopping(self) -> bool:
        """Whether its attempt has been asked to end."""
        return self.active and self._attempt is not None and self._attempt.ending is not None

    @property
    def seconds_to_wait(self) -> float:
        """What is left of the back-off after a failure."""
        return max(0.0, self._ready_at - time.monotonic())

    def stamp(self, lease_term: int) -> None:
        """Take the run over under a lease: from now on whoever held it before can write no state."""
        while True:
            if self.status.lease_term > lease_term:
                message = f"run {self.run.name} is carried under lease {self.status.lease_term}; {lease_term} is over"
                raise LeaseLost(message, self.status.lease_term)
            status = self.status if self.etag else self.status.to("queued", "submitted")
            try:
                self._write(status.model_copy(update={"lease_term": lease_term}))
                break
            except LeaseLost:  # whoever held it before has just written once more
                self._unsettled = None
                self.status, self.etag = self.run.status()
        self.commands_pending = True

    def start(self, workers: int) -> None:
        """Begin the next attempt of a queued run."""
        attempt = max([self.status.attempt, *self.run.started()]) + 1
        self._mine, self._attempt, self.heartbeat = attempt, None, None
        with_workers = f"with {workers} worker{'s' if workers > 1 else ''}"
        self.to("starting", f"attempt {attempt} {with_workers}", attempt=attempt, workers=workers)

    def request_stop(self, reason: str) -> None:
        """Have the attempt save and end; the run is then queued again."""
        if self._attempt and not self._attempt.ending:
            self._attempt.request_stop(self.run.send_command("stop", self.status.attempt, reason))

    def resume(self, reason: str, **facts: int) -> None:
        """Queue an ended run again, unless it has succeeded."""
        if self.status.state in ("failed", "cancelled"):
            self._ready_at = 0.0
            self.to("queued", reason, no_progress_attempts=0, out_of_memory_attempts=0, **facts)

    def step(self) -> None:
        """Look at everything once, and do what is due."""
        self._settle()
        if self.commands_pending:
            self._heed()
            self.commands_pending = False
        if self.active:
            self._look()

    def to(self, state: State, reason: str, **facts: int) -> None:
        """Change the state, in storage first."""
        self._write(self.status.to(state, reason, **facts))

    def show(self, outage: StorageUnavailable) -> None:
        """Show whoever watches what this run waits for."""
        beat = self.heartbeat or Heartbeat(phase="waiting for storage")
        facts = {"phase": "waiting for storage", "seconds_left": None, "waiting": outage.reason}
        self.watch(self.status, beat.model_copy(update=facts))

    def interrupt(self, reason: str) -> None:
        """Let the attempt save and end, and wait for that; kill it when it takes too long or cannot be."""
        driver = self._attempt.driver if self._attempt else None
        try:
            if driver and driver.poll() is None:
                self.run.send_command("stop", self.status.attempt, reason)
            deadline = time.monotonic() + LEAVE_SECONDS
            while driver and driver.poll() is None and time.monotonic() < deadline:
                beat = self.run.heartbeat(self.status.attempt)
                if beat is None or beat.phase == "starting":
                    break  # nothing was trained yet: there is nothing to save
                time.sleep(POLL_SECONDS)
        except (KeyboardInterrupt, StorageUnavailable):
            pass  # while the store is away nothing can be saved
        finally:
            if driver and driver.poll() is None:
                driver.kill()
        if self.active:
            with contextlib.suppress(StorageUnavailable, LeaseLost):  # the state stays until somebody carries it on
                self._settle()
                self.to("queued", f"{reason}; goes on from step {self._progress()}")

    # Commands

    def _heed(self) -> None:
        for command in self.run.commands(after=self.status.last_command):
            self._obey(command)
            if self.status.last_command < command.seq:
                self._write(self.status.model_copy(update={"last_command": command.seq}))

    def _obey(self, command: Command) -> None:
        if command.action == "resume":
            self.resume(command.reason, last_command=command.seq)
        elif self.status.state == "queued" and command.then == "cancelled":
            self.to("cancelled", command.reason, last_command=command.seq)
        elif self.active and command.attempt == self.status.attempt:
            self._in_hand().request_stop(command)
        elif self.active and command.then == "cancelled":  # the next attempt had begun meanwhile
            again = self.run.send_command(command.action, self.status.attempt, command.reason, command.then)
            self._in_hand().request_stop(again)

    # An attempt

    def _in_hand(self) -> _Attempt:
        if self._attempt is None:
            run, attempt, workers = self.run, self.status.attempt, self.status.workers
            driver = (
                self.backend.start(run.storage.url, run.job, run.model, attempt, workers)
                if attempt == self._mine
                else self.backend.find(run.job, run.model, attempt)
            )
            found = _Attempt(driver)
            for command in (
                run.commands(attempt) if attempt != self._mine else ()
            ):  # heard by who carried this run before
                found.request_stop(command)
            self._attempt = found
        return self._attempt

    def _look(self) -> None:
        attempt = self._in_hand()
        code = attempt.driver.poll()
        self._follow(self.run.heartbeat(self.status.attempt))
        if code is not None:
            number = self.status.attempt
            result = self.run.result(number) or self._without_result(code, attempt.driver.reason)
            self._decide(result, never_began=code == LOST and not self.run.attempt_start(number))
            return
        if attempt.driver.waiting not in ("", self.status.reason) and self.status.state == "starting":
            self.to("starting", attempt.driver.waiting)
        age = attempt.grow_older(self.heartbeat)
        beat = self.heartbeat or Heartbeat(phase="starting")
        if attempt.ending:
            attempt.press(beat)
        elif age > _patience(beat):
            where = f"in phase {beat.phase!r} at step {beat.step}"
            attempt.request_stop(
                self.run.send_command("kill", self.status.attempt, f"no progress for {age:.0f} s {where}")
            )

    def _follow(self, heartbeat: Heartbeat | None) -> None:
        """Take over what the driver shows of itself."""
        if heartbeat is None:
            return
        self.heartbeat = heartbeat
        if heartbeat.phase == "publishing" and self.status.state != "publishing":
            self.to("publishing", "training has ended")
        elif heartbeat.phase not in ("starting", "publishing") and self.status.state == "starting":
            self.to("running", "the workers train")
        self.watch(self.status, heartbeat)

    def _without_result(self, code: int, reason: str) -> Result:
        """What is to be said of an attempt whose driver said nothing."""
        message = reason or f"the driver ended with code {code} and left no result"
        if code == PREEMPTED or any(command.action == "stop" for command in self.run.commands(self.status.attempt)):
            return Result(outcome="stopped", message=message)
        return Result(outcome="failed", cause="infrastructure", message=message)

    def _decide(self, result: Result, never_began: bool) -> None:
        """What comes after an attempt."""
        self._ended_by = result.cause or result.outcome
        if result.outcome == "succeeded":
            self.to("succeeded", result.message)
            return
        number = self.status.attempt
        commands = [command for command in self.run.commands(number) if command.action != "resume"]
        cancel = next((command for command in commands if command.then == "cancelled"), None)
        if cancel:
            self._ended_by = "cancelled"  # nothing failed, also where it was ended at once
            self.to("cancelled", f"{cancel.reason}; a resume goes on from step {self._progress()}")
            return
        left = result.outcome == "stopped"
        saved = any(ref.attempt == number for ref in self.run.checkpoints())
        counts = not (left or never_began or result.cause in UNCOUNTED)
        no_progress_attempts = 0 if saved else self.status.no_progress_attempts + counts
        memory = self.status.out_of_memory_attempts + (result.cause == "out of memory")
        facts = {"no_progress_attempts": no_progress_attempts, "out_of_memory_attempts": memory}
        message = commands[0].reason if commands else result.message  # later ones only press for the same end
        if not (left or result.cause in RETRIED) or memory >= MAX_OUT_OF_MEMORY_ATTEMPTS:
            self.to("failed", result.message, **facts)
        elif counts and no_progress_attempts >= MAX_NO_PROGRESS_ATTEMPTS:
            self.to("failed", f"{no_progress_attempts} attempts without a new checkpoint; the last: {message}", **facts)
        else:
            self._waits = 0 if saved or left else self._waits + 1
            pause = 0.0 if left else BACK_OFF_SECONDS[min(self._waits, len(BACK_OFF_SECONDS) - 1)]
            self._ready_at = time.monotonic() + pause
            self.to("queued", f"{message}; goes on from step {self._progress()}", **facts)

    def _progress(self) -> int:
        return max((ref.step for ref in self.run.checkpoints()), default=0)

    # Writing

    def _write(self, status: Status) -> None:
        self._unsettled = status, secrets.token_hex(16)
        self._settle()

    def _settle(self) -> None:
        """Bring a write to its end whose answer may have been lost."""
        if self._unsettled is None:
            return
        status, nonce = self._unsettled
        try:
            self.etag = self.run.write_status(status, self.etag, nonce)
        except Conflict:
            raise LeaseLost(f"run {self.run.name} is carried by another dispatcher; this one stops") from None
        if len(status.history) > len(self.status.history):
            log.info("%s: %s (%s)", self.run.name, status.state, status.reason)
            self._count(status)
        self.status, self._unsettled = status, None
        self.watch(status, None)

    def _count(self, status: Status) -> None:
        """A change that is in storage: so each counts once, whoever else tried it."""
        before = self.status.history[-1] if self.status.history else None
        if before and (before.state, status.state) == ("queued", "starting"):
            waited = datetime.fromisoformat(status.history[-1].time) - datetime.fromisoformat(before.time)
            QUEUE_WAIT_SECONDS.observe(max(0.0, waited.total_seconds()))
        if self._ended_by and status.state not in ACTIVE:
            ATTEMPTS.labels(self._ended_by).inc()
            self._ended_by = None
        if status.state in ENDED:
            RUNS_ENDED.labels(status.state).inc()


def run_to_completion(
    storage: Storage, backend: Backend, job: str, model: str, workers: int, watch: Watch
) -> tuple[Status, Result | None]:
    """Bring one run to its end, from wherever it stands. One that succeeded or failed its gate is left as it is.

    Raises:
        KeyboardInterrupt: Ctrl-C; the attempt has saved and left, and the run is queued again.
        LeaseLost: another dispatcher carries this run.
    """
    run = Run(storage, job, model)
    status, etag = retry_until_available(run.status)
    result = retry_until_available(lambda: run.result(status.attempt)) if status.attempt else None
    if status.state == "succeeded" or (status.state == "failed" and result and result.cause == "gate"):
        return status, result
    status = status.model_copy(
        update={"no_progress_attempts": 0, "out_of_memory_attempts": 0}
    )  # a person has asked for it once more
    supervisor = Supervisor(run, backend, status, etag, watch)
    try:
        while True:
            try:
                supervisor.step()
                if supervisor.status.state in ENDED and supervisor.status is not status:
                    return supervisor.status, retry_until_available(lambda: run.result(supervisor.status.attempt))
                supervisor.resume("started again")
                if supervisor.status.state == "queued" and not supervisor.seconds_to_wait:
                    supervisor.start(workers)
                    continue
            except Exception as error:
                outage = outage_of_disk(error)  # of the store, or of this machine's disk
                if outage is None:
                    raise
                supervisor.show(outage)  # the next round goes on
            time.sleep(POLL_SECONDS)
    except BaseException as interruption:
        stopped = isinstance(interruption, KeyboardInterrupt)
        supervisor.interrupt("stopped by Ctrl-C" if stopped else f"stopped: {interruption}")
        raise
