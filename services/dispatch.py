"""From a queued run to its end: starts attempts, watches them, and decides by class of failure what comes next.

This is the simplest form of the dispatcher: it carries one run after the other, with drivers as subprocesses. It alone
writes the states of the runs it carries; each write is a compare-and-swap, so of two dispatchers one stops at its next
write. What an overtaken driver still writes stays outside the run's chain. A store that is away is waited for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from genmodels.errors import Conflict, GenmodelsError, StorageUnavailable
from genmodels.run import Heartbeat, Result, Run, State, Status, patiently
from genmodels.storage import Storage

POLL_SECONDS = 0.5
LEAVE_SECONDS = 60.0  # for an attempt to save and end before it is killed
BACK_OFF_SECONDS = (1.0, 5.0, 15.0)
FRUITLESS_ATTEMPTS = 3  # attempts in a row without a new checkpoint that end a run
OUT_OF_MEMORY_ATTEMPTS = 2  # that end a run; one may have been another process's doing

Watch = Callable[[Status, Heartbeat | None], None]


class Driver(Protocol):
    """A driver that was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def kill(self) -> None:
        """End it and everything it started, at once."""


class Backend(Protocol):
    """Where drivers run."""

    def start(self, storage_url: str, job: str, model: str, attempt: int) -> Driver: ...


class SubprocessBackend:
    """Drivers as processes of this machine, in sessions of their own: a Ctrl-C in the terminal is not theirs."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self.logs, self.environment = logs, environment

    def start(self, storage_url: str, job: str, model: str, attempt: int) -> Driver:
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "services.train", "--storage", storage_url, "--job", job, "--model", model]
        with self.log(model, attempt).open("ab") as log:
            process = subprocess.Popen(
                [*command, "--attempt", str(attempt)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        return _Process(process)

    def log(self, model: str, attempt: int) -> Path:
        return self.logs / f"{model}-attempt-{attempt}.log"


class _Process:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Dispatcher:
    def __init__(self, storage: Storage, backend: Backend) -> None:
        self.storage, self.backend = storage, backend

    def carry(self, job: str, model: str, watch: Watch) -> tuple[Status, Result | None]:
        """Bring a run to its end, from wherever it stands. One that has succeeded or failed its gate is left as it is.

        Raises:
            KeyboardInterrupt: Ctrl-C; the attempt has saved and left, and the run is queued again.
            GenmodelsError: another dispatcher carries this run.
        """
        run = Run(self.storage, job, model)
        status, etag = patiently(run.status)
        result = patiently(lambda: run.result(status.attempt)) if status.attempt else None
        if status.state == "succeeded" or (status.state == "failed" and result and result.cause == "gate"):
            return status, result
        state = _Statekeeper(run, status, etag, watch)
        fruitless = memory = 0
        while True:
            attempt = state.status.attempt + 1
            result = self._attempt(run, attempt, state)
            if result.outcome == "succeeded":
                return state.to("succeeded", result.message), result
            saved = any(place.attempt == attempt for place in patiently(run.checkpoints))
            fruitless = 0 if saved else fruitless + 1
            memory += result.cause == "out of memory"
            retry = result.outcome == "left" or result.cause in ("infrastructure", "superseded", "out of memory")
            if not retry or memory >= OUT_OF_MEMORY_ATTEMPTS:
                return state.to("failed", result.message), result
            if fruitless >= FRUITLESS_ATTEMPTS:
                reason = f"{fruitless} attempts without a new checkpoint; the last: {result.message}"
                return state.to("failed", reason), result
            state.to("queued", result.message)
            time.sleep(BACK_OFF_SECONDS[fruitless])

    def _attempt(self, run: Run, attempt: int, state: _Statekeeper) -> Result:
        driver: Driver | None = None
        try:
            state.to("starting", f"attempt {attempt}", attempt)
            driver = self.backend.start(self.storage.url, run.job, run.model, attempt)
            while (code := driver.poll()) is None:
                with contextlib.suppress(StorageUnavailable):  # the driver waits for storage too; look again
                    state.follow(run.heartbeat(attempt))
                time.sleep(POLL_SECONDS)
            state.follow(patiently(lambda: run.heartbeat(attempt)))
            message = f"the driver ended with code {code} and left no result"
            lost = Result(outcome="failed", cause="infrastructure", message=message)
            return patiently(lambda: run.result(attempt)) or lost
        except BaseException as interruption:
            reason = "stopped by Ctrl-C" if isinstance(interruption, KeyboardInterrupt) else f"stopped: {interruption}"
            if driver:
                self._leave(run, attempt, driver, reason)
            with contextlib.suppress(StorageUnavailable):  # then the state stays until somebody carries the run on
                state.to("queued", f"{reason}; goes on from step {_progress(run)}", wait=False)
            raise

    def _leave(self, run: Run, attempt: int, driver: Driver, reason: str) -> None:
        """Let an attempt save and end; kill it when that takes too long, cannot be, or a second Ctrl-C comes."""
        try:
            if driver.poll() is None:
                run.wish("leave", attempt, reason)
            deadline = time.monotonic() + LEAVE_SECONDS
            while driver.poll() is None and time.monotonic() < deadline:
                beat = run.heartbeat(attempt)
                if beat is None or beat.phase == "starting":
                    break  # nothing was trained yet: there is nothing to save
                time.sleep(POLL_SECONDS)
        except (KeyboardInterrupt, StorageUnavailable):
            pass  # while the store is away nothing can be saved
        finally:
            if driver.poll() is None:
                driver.kill()


class _Statekeeper:
    """Writes a run's states by compare-and-swap, then tells the watcher."""

    def __init__(self, run: Run, status: Status, etag: str | None, watch: Watch) -> None:
        self.run, self.status, self.etag, self.watch = run, status, etag, watch

    def to(self, state: State, reason: str, attempt: int | None = None, *, wait: bool = True) -> Status:
        """The new status, once it is in storage; `wait` for a store that is away."""
        status, nonce = self.status.to(state, reason, attempt), secrets.token_hex(16)

        def swap() -> str:
            return self.run.write_status(status, self.etag, nonce)

        try:
            self.etag = patiently(swap) if wait else swap()
        except Conflict:
            name = f"{self.run.job}/{self.run.model}"
            raise GenmodelsError(f"run {name} is carried by another dispatcher; this one stops") from None
        self.status = status
        self.watch(status, None)
        return status

    def follow(self, heartbeat: Heartbeat | None) -> None:
        """Take over what the driver shows of itself."""
        if heartbeat is None:
            return
        if heartbeat.phase == "publishing" and self.status.state != "publishing":
            self.to("publishing", "training has ended")
        elif heartbeat.phase not in ("starting", "publishing") and self.status.state == "starting":
            self.to("running", "the workers train")
        self.watch(self.status, heartbeat)


def _progress(run: Run) -> int:
    return max((place.step for place in run.checkpoints()), default=0)
