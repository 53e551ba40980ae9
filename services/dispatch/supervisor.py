"""Bring one run from queued to its end: start attempts, watch them, and write each change of state.

A `Supervisor` alone writes the state of its run. Each write is a compare-and-swap: if two supervisors work on one run,
one of them stops at its next write. What a superseded driver still writes stays outside the run's chain.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from datetime import datetime

from genmodels.errors import Conflict, LeaseLost, StorageUnavailable
from genmodels.metrics import ATTEMPTS, QUEUE_WAIT_SECONDS, RUNS_ENDED
from genmodels.runs.records import ACTIVE, ENDED, Cause, Command, Heartbeat, Result, State, Status
from genmodels.runs.store import Run
from services.dispatch.attempt import AttemptMonitor, hang_timeout
from services.dispatch.backends.base import LOST, PREEMPTED, REFUSED, Backend, Driver, Watch
from services.dispatch.retry_policy import decide

HEARTBEATS = 4  # that are read at least before a silence counts as a hang

log = logging.getLogger("genmodels.supervise")


class Supervisor:
    """Supervise one run. Call `step` again and again.

    If the store does not answer, methods raise StorageUnavailable, and the next `step` continues from there. If another
    process has written the run's state, they raise LeaseLost, and this supervisor is of no further use.

    Attributes:
        status: as it is in storage.
        heartbeat: the latest of the attempt.
        commands_pending: True if the next step is to read new commands.
        rest_seconds: between two reads of the heartbeat of a run that simply trains; 0: each step reads it.
        postponed: True if this read is not to take place now, although it is due: enough others do.
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
        self.commands_pending, self.rest_seconds, self.postponed = False, 0.0, False
        self._unsettled: tuple[Status, str] | None = None  # a write that may or may not have happened, and its nonce
        self._monitor: AttemptMonitor | None = None
        self._ahead: list[Heartbeat | None] = []  # the heartbeat that `look` has read for the next step
        self._next_read: float | None = None  # when the heartbeat is due
        self._rest = 0.0  # seconds from the read before until then
        self._own_attempt = 0  # number of the attempt that this supervisor starts; it finds other attempts started
        self._outcome: str | None = None  # of an attempt whose end is not in storage yet
        self._ready_at = 0.0
        self._failures = 0  # in a row without a new checkpoint

    @property
    def active(self) -> bool:
        return self.status.state in ACTIVE

    @property
    def waits(self) -> bool:
        """Return True if the run is certainly queued: the store has answered the last write."""
        return self.status.state == "queued" and self._unsettled is None

    @property
    def stopping(self) -> bool:
        """Return True if a stop or kill of the attempt was requested."""
        return self.active and self._monitor is not None and self._monitor.ending is not None

    @property
    def driver(self) -> Driver | None:
        """Return the driver of the attempt, None before an attempt is started or re-attached."""
        return self._monitor.driver if self._monitor else None

    @property
    def seconds_to_wait(self) -> float:
        """Return the seconds that remain of the back-off after a failure."""
        return max(0.0, self._ready_at - time.monotonic())

    def stamp(self, lease_term: int) -> None:
        """Take the run over under a lease: the holder before can write no state from now on."""
        while True:
            if self.status.lease_term > lease_term:
                newer = self.status.lease_term
                raise LeaseLost(f"run {self.run.name} is in lease term {newer}; term {lease_term} is over", newer)
            status = self.status if self.etag else self.status.to("queued", "submitted")
            try:
                self._write(status.model_copy(update={"lease_term": lease_term}))
                break
            except LeaseLost:  # the holder before has just written once more
                self._unsettled = None
                self.status, self.etag = self.run.status()
        self.commands_pending = True

    def start(self, workers: int) -> None:
        """Begin the next attempt of a queued run."""
        attempt = max([self.status.attempt, *self.run.started()]) + 1
        self._own_attempt, self._monitor, self.heartbeat, self._ahead = attempt, None, None, []
        with_workers = f"with {workers} worker{'s' if workers > 1 else ''}"
        self.to("starting", f"attempt {attempt} {with_workers}", attempt=attempt, workers=workers)

    def request_stop(self, reason: str) -> None:
        """Tell the attempt to save and end; the run is then queued again."""
        if self._monitor and not self._monitor.ending:
            self._monitor.request_stop(self.run.send_command("stop", self.status.attempt, reason))

    def resume(self, reason: str, **facts: int) -> None:
        """Queue an ended run again, unless it has succeeded."""
        if self.status.state in ("failed", "cancelled"):
            self._ready_at = 0.0
            self.to("queued", reason, no_progress_attempts=0, out_of_memory_attempts=0, **facts)

    def look(self) -> None:
        """Read what the next step decides by. It changes nothing, so that many runs can be read at once."""
        self._ahead = []
        is_started = self._monitor is not None or self.status.attempt != self._own_attempt
        if self.active and is_started:
            self._active_attempt().driver.look()
            if self._is_due():
                self._ahead = [self.run.heartbeat(self.status.attempt)]

    def step(self) -> None:
        """Look at the commands and the attempt once, and do what is due."""
        self._settle()
        if self.commands_pending:
            self._apply_commands()
            self.commands_pending = False
        if self.active:
            self._poll_attempt()

    def to(self, state: State, reason: str, **facts: int) -> None:
        """Change the state, in storage first."""
        self._write(self.status.to(state, reason, **facts))

    def show_outage(self, outage: StorageUnavailable) -> None:
        """Call `watch` with what this run waits for."""
        heartbeat = self.heartbeat or Heartbeat(phase="waiting for storage")
        facts = {"phase": "waiting for storage", "seconds_left": None, "waiting": outage.reason}
        self.watch(self.status, heartbeat.model_copy(update=facts))

    def requeue(self, reason: str) -> None:
        """Queue the run again after its attempt was ended."""
        self._settle()
        step = max((ref.step for ref in self.run.checkpoints()), default=0)
        self.to("queued", f"{reason}; continues from step {step}")

    # Commands

    def _apply_commands(self) -> None:
        for command in self.run.commands(after=self.status.last_command):
            self._apply_command(command)
            if self.status.last_command < command.seq:
                self._write(self.status.model_copy(update={"last_command": command.seq}))

    def _apply_command(self, command: Command) -> None:
        if command.action == "resume":
            self.resume(command.reason, last_command=command.seq)
        elif self.status.state == "queued" and command.then == "cancelled":
            self.to("cancelled", command.reason, last_command=command.seq)
        elif self.active and command.attempt == self.status.attempt:
            self._active_attempt().request_stop(command)
        elif self.active and command.then == "cancelled":  # the next attempt had begun meanwhile
            again = self.run.send_command(command.action, self.status.attempt, command.reason, command.then)
            self._active_attempt().request_stop(again)

    # An attempt

    def _active_attempt(self) -> AttemptMonitor:
        """Return the monitor of the active attempt; start its driver or find the one that was started before."""
        if self._monitor is None:
            run, attempt, workers = self.run, self.status.attempt, self.status.workers
            if attempt == self._own_attempt:
                monitor = AttemptMonitor(self.backend.start(run.storage.url, run.job, run.model, attempt, workers))
            else:
                monitor = AttemptMonitor(self.backend.find(run.job, run.model, attempt))
                for command in run.commands(attempt) if self.status.last_command else ():
                    monitor.request_stop(command)  # the supervisor before has applied it
            self._monitor = monitor
        return self._monitor

    def _poll_attempt(self) -> None:
        monitor = self._active_attempt()
        code = monitor.driver.poll()
        if code is None and not self._ahead and not self._is_due():
            return
        self._apply_heartbeat(self._ahead.pop() if self._ahead else self.run.heartbeat(self.status.attempt))
        if code is not None:
            attempt = self.status.attempt
            result = self.run.result(attempt) or self._missing_result(code, monitor.driver.reason)
            has_begun = code != LOST or self.run.attempt_start(attempt) is not None
            self._finish_attempt(result, has_begun, preempted=monitor.driver.reason if code == PREEMPTED else "")
            return
        obstacle = monitor.driver.waiting or monitor.driver.problem
        if obstacle not in ("", self.status.reason) and self.status.state == "starting":
            self.to("starting", obstacle)
        silence = monitor.observe(self.heartbeat, self._rest)
        heartbeat = self.heartbeat or Heartbeat(phase="starting")
        if monitor.ending:
            monitor.kill_if_overdue(heartbeat)
        elif silence > hang_timeout(heartbeat):
            reason = f"no progress for {silence:.0f} s in phase {heartbeat.phase!r} at step {heartbeat.step}"
            reason += f"; {monitor.driver.problem}" if monitor.driver.problem else ""
            monitor.request_stop(self.run.send_command("kill", self.status.attempt, reason))

    @property
    def next_read(self) -> float | None:
        """Return when the heartbeat of a run that simply trains is due; None: each step reads the heartbeat."""
        if self.status.state != "running" or self.stopping:
            return None
        if self._next_read is None:  # after a take-over not all runs are due at once
            self._next_read = time.monotonic() + random.uniform(0.0, self.rest_seconds)
        return self._next_read

    def _is_due(self) -> bool:
        """Return True if the heartbeat must be read now: of a run that simply trains it may be some seconds old."""
        due = self.next_read
        return due is None or (time.monotonic() >= due and not self.postponed)

    def _apply_heartbeat(self, heartbeat: Heartbeat | None) -> None:
        """Change the state to what the heartbeat shows."""
        if heartbeat is None:
            return
        self.heartbeat = heartbeat
        self._rest = min(self.rest_seconds, hang_timeout(heartbeat) / HEARTBEATS) * random.uniform(0.5, 1.0)
        self._next_read = time.monotonic() + self._rest  # at random, so that not all runs are due in one round
        if heartbeat.phase == "publishing" and self.status.state != "publishing":
            self.to("publishing", "training has ended")
        elif heartbeat.phase not in ("starting", "publishing") and self.status.state == "starting":
            self.to("running", "the workers train")
        self.watch(self.status, heartbeat)

    def _missing_result(self, code: int, reason: str) -> Result:
        """Build the result of an attempt whose driver wrote none."""
        ended = "is gone" if code == LOST else f"ended with code {code}"
        message = reason or f"the driver {ended} and left no result"
        if code == PREEMPTED or any(command.action == "stop" for command in self.run.commands(self.status.attempt)):
            return Result(outcome="stopped", message=message)
        cause: Cause = "template" if code == REFUSED else "infrastructure"
        return Result(outcome="failed", cause=cause, message=message)

    def _finish_attempt(self, result: Result, has_begun: bool, preempted: str) -> None:
        """Write the state that follows an attempt."""
        self._outcome = result.cause or result.outcome
        if result.outcome == "succeeded":
            self.to("succeeded", result.message)
            return
        commands, checkpoints = self.run.commands(self.status.attempt), self.run.checkpoints()
        decision = decide(
            *(self.status, result, commands, checkpoints),
            failures=self._failures,
            has_begun=has_begun,
            preempted=preempted,
        )
        if decision.state == "cancelled":
            self._outcome = "cancelled"  # also if the attempt was killed: it did not fail
        if decision.state == "queued":
            self._failures, self._ready_at = decision.failures, time.monotonic() + decision.back_off
        self.to(decision.state, decision.reason, **decision.facts)

    # Writing

    def _write(self, status: Status) -> None:
        self._unsettled = status, secrets.token_hex(16)
        self._settle()

    def _settle(self) -> None:
        """Complete a write whose answer may have been lost."""
        if self._unsettled is None:
            return
        status, nonce = self._unsettled
        try:
            self.etag = self.run.write_status(status, self.etag, nonce)
        except Conflict:
            raise LeaseLost(f"another dispatcher works on run {self.run.name}; this one stops") from None
        if len(status.history) > len(self.status.history):
            log.info("%s: %s (%s)", self.run.name, status.state, status.reason)
            self._count(status)
        self.status, self._unsettled = status, None
        self.watch(status, None)

    def _count(self, status: Status) -> None:
        """Count a change of state. It is in storage, so it counts once, whichever process writes it."""
        before = self.status.history[-1] if self.status.history else None
        if before and (before.state, status.state) == ("queued", "starting"):
            waited = datetime.fromisoformat(status.history[-1].time) - datetime.fromisoformat(before.time)
            QUEUE_WAIT_SECONDS.observe(max(0.0, waited.total_seconds()))
        if self._outcome and status.state not in ACTIVE:
            ATTEMPTS.labels(self._outcome).inc()
            self._outcome = None
        if status.state in ENDED:
            RUNS_ENDED.labels(status.state).inc()
