"""Child processes that are kept running: restarted when they end, and ended when this process ends.

What this process cannot do if it is killed is done by a reaper (`services.cluster.reaper`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from services.cluster.environment import python
from services.cluster.reaper import REMOVE, kill_session

BACK_OFF_SECONDS = (0.2, 1.0, 3.0, 10.0, 30.0)
STEADY_SECONDS = 60.0  # of running, after which the back-off begins again
READY_EVERY = 0.5  # seconds between two readiness checks of a process

PrintLine = Callable[[str], None]


@dataclass
class ManagedProcess:
    """A child process that `poll` keeps running, under a reaper.

    Attributes:
        log: the file that its output is appended to; None: this process's own output.
        ready: return whether the process is ready; quick to answer.
        address: printed when the process is ready, e.g. its URL.
        environment: all of its variables. Secrets belong here: other users cannot read them.
        folder: its working directory; default: this process's.
        temporary: a folder that the reaper removes if this process is killed.
    """

    name: str
    command: list[str]
    log: Path | None
    ready: Callable[[], bool]
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    temporary: Path | None = None

    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    is_ready: bool = field(default=False, init=False)
    _started: float = field(default=0.0, init=False)
    _start_at: float = field(default=0.0, init=False)
    _check_at: float = field(default=0.0, init=False)
    _failures: int = field(default=0, init=False)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def poll(self, print_line: PrintLine) -> None:
        """Start the process if a start is due; else check whether it has ended or become ready."""
        now = time.monotonic()
        if self.process is None:
            if now >= self._start_at:
                self._start()
        elif (code := self.process.poll()) is not None:
            self._schedule_restart(code, print_line)
        elif not self.is_ready and now >= self._check_at:
            self._check_at = now + READY_EVERY
            if self.ready():
                self.is_ready = True
                print_line(f"{self.name:<12} {self.address}   ready after {time.monotonic() - self._started:.0f} s")

    def stop(self, seconds: float) -> None:
        """Send SIGTERM, and after `seconds` SIGKILL to all processes that are left of it."""
        if self.process is None:
            return
        if seconds:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self._kill_all()

    def _start(self) -> None:
        remove = [f"{REMOVE}{self.temporary}"] if self.temporary else []
        with self._output() as log:
            self.process = subprocess.Popen(
                python("cluster.reaper", *remove, *self.command),
                stdin=subprocess.PIPE,  # never written to; its end shows the reaper that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                cwd=self.folder,
                start_new_session=True,
            )
        self.is_ready, self._started = False, time.monotonic()

    def _schedule_restart(self, code: int, print_line: PrintLine) -> None:
        self._kill_all()
        now = time.monotonic()
        self._failures = 0 if now - self._started > STEADY_SECONDS else self._failures
        pause = BACK_OFF_SECONDS[min(self._failures, len(BACK_OFF_SECONDS) - 1)]
        self._failures += 1
        self._start_at = now + pause
        log = f". Log: {self.log}" if self.log else ""
        print_line(f"{self.name:<12} {_how_it_ended(code)}; restarts in {pause:g} s{log}")

    def _output(self) -> contextlib.AbstractContextManager[BinaryIO | None]:
        if self.log is None:
            return contextlib.nullcontext()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("ab")

    def _kill_all(self) -> None:
        """Kill the process and every process that it started."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        kill_session(self.process.pid)
        if self.process.stdin:
            self.process.stdin.close()
        self.process = None


@contextlib.contextmanager
def removed_if_killed(folder: Path) -> Iterator[None]:
    """Let a reaper remove a folder if this process is killed in this context."""
    reaper = subprocess.Popen(
        python("cluster.reaper", f"{REMOVE}{folder}", "tail", "-f", os.devnull),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        reaper.kill()
        kill_session(reaper.pid)
        reaper.communicate()


def _how_it_ended(code: int) -> str:
    """Describe an exit code: a negative one is a signal that ended the reaper, one above 128 ended the command."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with code {code}"
