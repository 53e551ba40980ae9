"""Run drivers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from services.cluster.environment import python
from services.dispatch.backends.base import LOST, Backend, Capacity, Driver, driver_command


class SubprocessBackend(Backend):
    """Drivers as processes of this machine, in sessions of their own: a Ctrl-C in the terminal is not theirs.

    Each has a reaper, so that no driver outlives this process.
    """

    def __init__(
        self, logs: Path, environment: dict[str, str], capacity: Capacity | None = None, folder: Path | None = None
    ) -> None:
        """Args:
        capacity: of the Ray that the drivers connect to; default: the CPUs of this machine.
        folder: that they work in; default: this process's.
        """
        self.logs, self.environment, self.folder = logs, environment, folder
        self._capacity = capacity or Capacity(cpus=os.cpu_count() or 1, gpus=0)
        self._drivers: dict[tuple[str, str, int], Driver] = {}

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(model, attempt).open("ab") as output:
            process = subprocess.Popen(
                python("cluster.reaper", *driver_command(storage_url, job, model, attempt, workers)),
                stdin=subprocess.PIPE,  # never written to; its end shows the reaper that this process is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.folder,
                start_new_session=True,
            )
        self._drivers[job, model, attempt] = driver = _Process(process)
        return driver

    def find(self, job: str, model: str, attempt: int) -> Driver:
        return self._drivers.get((job, model, attempt), _Gone())

    def capacity(self) -> Capacity | None:
        return self._capacity

    def log(self, model: str, attempt: int) -> Path:
        return self.logs / f"{model}-attempt-{attempt}.log"


class _Process(Driver):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None and self.process.stdin:
            self.process.stdin.close()
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.poll()


class _Gone(Driver):
    def poll(self) -> int | None:
        return LOST

    def kill(self) -> None:
        pass
