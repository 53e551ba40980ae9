"""Run drivers as processes of this machine. A driver whose attempt ended well takes the next attempt."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from services.cluster.environment import ROOT, python
from services.cluster.reaper import PASS
from services.dispatch.backends.base import LOST, Backend, Capacity, Driver, turns_command

END_SECONDS = 30.0  # that an idle driver has to give its workers back and end
IDLE_SECONDS = 60.0  # that a driver without an attempt is kept, with its worker group and the memory of both


class SubprocessBackend(Backend):
    """Drivers as processes of this machine, in sessions of their own: a Ctrl-C in the terminal is not theirs.

    Each has a reaper, so that no driver outlives this process. An idle driver takes the next attempt, if the code and
    the environment are those that it was started with. It is ended after `IDLE_SECONDS`.
    """

    def __init__(
        self, logs: Path, environment: dict[str, str], capacity: Capacity | None = None, folder: Path | None = None
    ) -> None:
        """Args:
        capacity: of the Ray that the drivers connect to; default: the CPUs of this machine.
        folder: that they work in; default: this process's.
        """
        self.logs, self.environment, self.folder = logs.absolute(), environment, folder
        self._capacity = capacity or Capacity(cpus=os.cpu_count() or 1, gpus=0)
        self._turns: dict[tuple[str, str, int], _Turn] = {}
        self._lock = threading.Lock()

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.log(model, attempt)
        environment, code = {**os.environ, **self.environment}, _code()
        turn = {"storage_url": storage_url, "job": job, "model": model, "attempt": attempt, "workers": workers}
        with self._lock:
            process = self._idle_process(environment, code)
            process = process or _Process(environment, code, self.folder, log, self.end_idle)
            process.give(turn | {"log": str(log)})
            self._turns[job, model, attempt] = driver = _Turn(process)
        return driver

    def find(self, job: str, model: str, attempt: int) -> Driver:
        return self._turns.get((job, model, attempt), _Gone())

    def capacity(self) -> Capacity | None:
        return self._capacity

    def log(self, model: str, attempt: int) -> Path:
        return self.logs / f"{model}-attempt-{attempt}.log"

    def end_idle(self) -> None:
        """End the drivers that have no attempt, and give back what they hold."""
        with self._lock:
            for process in self._processes():
                process.end_if_idle()

    def _idle_process(self, environment: Mapping[str, str], code: int) -> _Process | None:
        """Return a driver that can take an attempt; end the idle drivers that cannot."""
        chosen = None
        for process in self._processes():
            fits = (process.environment, process.code) == (environment, code)
            if process.is_idle and fits and chosen is None:
                chosen = process
            else:
                process.end_if_idle()
        return chosen

    def _processes(self) -> set[_Process]:
        return {turn.process for turn in self._turns.values()}


class _Process:
    """A driver process, which has at most one attempt at a time.

    Args:
        code: time of the last change of the code that it runs.
        end_idle: called when it was idle for `IDLE_SECONDS`.
    """

    def __init__(
        self, environment: Mapping[str, str], code: int, folder: Path | None, log: Path, end_idle: Callable[[], None]
    ) -> None:
        self.environment, self.code = environment, code
        self._end_idle = end_idle
        self._waits = False
        self._timer: threading.Timer | None = None
        self._channel, theirs = socket.socketpair()
        number = theirs.fileno()
        with theirs, log.open("ab") as output:
            self._popen = subprocess.Popen(
                python("cluster.reaper", f"{PASS}{number}", *turns_command(number)),
                stdin=subprocess.PIPE,  # never written to; its end shows the reaper that this process is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
                pass_fds=[number],
            )
        self._channel.setblocking(False)

    @property
    def is_idle(self) -> bool:
        return self._waits and self._popen.poll() is None

    def give(self, turn: dict[str, object]) -> None:
        """Give an attempt to the process. If the process has just ended, `poll` shows it."""
        self._end_waiting()
        with contextlib.suppress(OSError):
            self._channel.sendall(json.dumps(turn).encode() + b"\n")

    def poll(self) -> int | None:
        """Return 0 if the attempt has ended and the process is idle, else the process's exit code; None: it works."""
        code = self._popen.poll()
        with contextlib.suppress(OSError):  # no answer yet, or the process has ended
            if self._channel.recv(1024):
                self._wait()
                return 0
        if code is not None:
            self._close()
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._close()

    def end_if_idle(self) -> None:
        """Let an idle process end by itself: it gives its workers back first."""
        if self._waits:
            self._end_waiting()
            self._channel.close()
            threading.Thread(target=self._see_end, daemon=True).start()

    def _see_end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(END_SECONDS)
        self._close()  # the reaper now kills what is left
        self._popen.wait()

    def _wait(self) -> None:
        self._waits = True
        self._timer = threading.Timer(IDLE_SECONDS, self._end_idle)
        self._timer.daemon = True
        self._timer.start()

    def _end_waiting(self) -> None:
        self._waits = False
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._channel.close()
        if self._popen.stdin:
            self._popen.stdin.close()


class _Turn(Driver):
    """One attempt of a process."""

    def __init__(self, process: _Process) -> None:
        self.process = process
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self.process.poll()
        return self._code

    def kill(self) -> None:
        if self.poll() is None:  # else the process may have another attempt
            self.process.kill()
            self.poll()


class _Gone(Driver):
    def poll(self) -> int | None:
        return LOST

    def kill(self) -> None:
        pass


def _code() -> int:
    """Return the time of the last change of the code that a driver runs."""
    files = (path for room in ("genmodels", "services") for path in (ROOT / room).rglob("*.py"))
    return max(path.stat().st_mtime_ns for path in files)
