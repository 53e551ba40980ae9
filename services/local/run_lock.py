"""One `genmodels run` of a job at a time on this machine. A second command shows the first one's progress.

The first command holds a file lock, which the system releases however the process ends. A second file names the models
and the endpoint of the first command. Only this user can read the two files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from rich.console import Console

from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage
from services.console.progress import Board, Shown

LOOK_SECONDS = 1.0


class Holder(BaseModel):
    """The process that runs a job. `endpoint` is known once it serves."""

    pid: int
    models: list[str]
    endpoint: str | None = None


class RunLock:
    """The lock of a job on this machine, and a description of its holder."""

    def __init__(self, storage: Storage, job: str) -> None:
        store = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        name = hashlib.sha256(f"{store} {storage.url} {job}".encode()).hexdigest()[:24]
        folder = Path(tempfile.gettempdir()) / f"genmodels-{os.getuid()}"
        self._lock, self._facts = FileLock(folder / f"{name}.lock", timeout=0), folder / f"{name}.json"

    @contextlib.contextmanager
    def hold(self, models: list[str]) -> Iterator[Holder | None]:
        """Hold the lock while the context is open, and yield None; if another process holds it, yield that holder."""
        try:
            self._facts.parent.mkdir(mode=0o700, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            yield self._holder()
            return
        except OSError:  # the files cannot be written here: other processes stay unknown
            yield None
            return
        try:
            self._write(Holder(pid=os.getpid(), models=models))
            yield None
        finally:
            self._facts.unlink(missing_ok=True)
            self._lock.release()

    def publish_endpoint(self, models: list[str], endpoint: str) -> None:
        """Record the URL at which the models are served."""
        self._write(Holder(pid=os.getpid(), models=models, endpoint=endpoint))

    def follow(self, storage: Storage, job: str, specs: list[ModelSpec], console: Console) -> Holder | None:
        """Show the progress of another process with a job until it serves; return None if it ends before."""
        with Board(console) as board:
            while True:
                for spec in specs:
                    board.show(_shown(Run(storage, job, spec.name), spec))
                holder = self._holder()
                if holder.endpoint:
                    return holder
                with contextlib.suppress(Timeout), self._lock:
                    return None
                time.sleep(LOOK_SECONDS)

    def _holder(self) -> Holder:
        try:
            return Holder.model_validate_json(self._facts.read_bytes())
        except (OSError, ValidationError):  # the holder has just started, or has just ended
            return Holder(pid=0, models=[])

    def _write(self, holder: Holder) -> None:
        with contextlib.suppress(OSError):
            part = self._facts.with_suffix(".part")
            part.write_text(holder.model_dump_json())
            part.replace(self._facts)


def _shown(run: Run, spec: ModelSpec) -> Shown:
    status, _ = run.status()
    heartbeat = run.heartbeat(status.attempt) if status.attempt else None
    facts = heartbeat.model_dump(include={"phase", "step", "loss", "seconds_left"}) if heartbeat else {}
    return Shown(spec.name, status.state, max_steps=spec.train.max_steps, note=status.reason, **facts)
