"""Child processes that are kept running: started again when they end, gone when this process is."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from services.cluster.environment import python
from services.cluster.reaper import REMOVE, sweep

BACK_OFF_SECONDS = (0.2, 1.0, 3.0, 10.0, 30.0)
STEADY_SECONDS = 60.0  # of running, after which an end counts as the first
READY_EVERY = 0.5  # seconds between two looks whether a child is ready

Tell = Callable[[str], None]


@dataclass
class Child:
    """One of them. Secrets belong into `environment`, which nobody else sees.

    Its output is appended to `log`; None: it goes where this process's goes. It works in `folder`, by default in this
    process's.
    """

    name: str
    command: list[str]
    log: Path | None
    ready: Callable[[], bool]  # quick to answer
    says: str  # what is shown when it is ready, e.g. its URL
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    leaves: Path | None = None  # a folder that its guard removes if this process is killed

    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    is_ready: bool = field(default=False, init=False)
    _began: float = field(default=0.0, init=False)
    _start_at: float = field(default=0.0, init=False)
    _look_at: float = field(default=0.0, init=False)
    _ends: int = field(default=0, init=False)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tend(self, tell: Tell) -> None:
        """Start it if it is due, see whether it is ready or has ended."""
        now = time.monotonic()
        if self.process is None:
            if now >= self._start_at:
                self._start()
        elif (code := self.process.poll()) is not None:
            self._ended(code, tell)
        elif not self.is_ready and now >= self._look_at:
            self._look_at = now + READY_EVERY
            if self.ready():
                self.is_ready = True
                tell(f"{self.name:<12} {self.says}   ready after {time.monotonic() - self._began:.0f} s")

    def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL for what is left of it after that time."""
        if self.process is None:
            return
        if seconds:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self._clear()

    def _start(self) -> None:
        with self._output() as log:
            self.process = subprocess.Popen(
                python("cluster.reaper", *([f"{REMOVE}{self.leaves}"] if self.leaves else []), *self.command),
                stdin=subprocess.PIPE,  # never written to; its end tells the guard that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                cwd=self.folder,
                start_new_session=True,
            )
        self.is_ready, self._began = False, time.monotonic()

    def _ended(self, code: int, tell: Tell) -> None:
        self._clear()
        now = time.monotonic()
        self._ends = 0 if now - self._began > STEADY_SECONDS else self._ends
        pause = BACK_OFF_SECONDS[min(self._ends, len(BACK_OFF_SECONDS) - 1)]
        self._ends += 1
        self._start_at = now + pause
        log = f". Log: {self.log}" if self.log else ""
        tell(f"{self.name:<12} {_how(code)}; it starts again in {pause:g} s{log}")

    def _output(self) -> contextlib.AbstractContextManager[BinaryIO | None]:
        if self.log is None:
            return contextlib.nullcontext()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("ab")

    def _clear(self) -> None:
        """Whatever it started goes with it."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        sweep(self.process.pid)
        if self.process.stdin:
            self.process.stdin.close()
        self.process = None


def _how(code: int) -> str:
    """A negative code is a signal that ended the guard, one above 128 a signal that ended the command."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with code {code}"
