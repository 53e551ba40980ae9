"""How a process that carries attempts ends: it hears of it, and has them save and leave first."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from genmodels.errors import GenmodelsError
from genmodels.runs.jobs import Jobs
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.cluster.processes import Tell
from services.dispatch.attempt import LEAVE_SECONDS
from services.dispatch.backends.base import Driver
from services.dispatch.backends.ray_jobs import RayJobsBackend
from services.dispatch.supervisor import ACTIVE

LOOK_SECONDS = 0.2


def leave(
    storage: Storage,
    backend: RayJobsBackend,
    reason: str,
    tell: Tell,
    may_wait: Callable[[], bool],
    only: Collection[str] | None = None,
) -> None:
    """Have attempts save and end, and wait for that; while the store is away nothing can be saved.

    Args:
        only: those of these runs, named job/model; default: all.
    """
    if not may_wait():
        return
    with suppress(GenmodelsError):
        leaving: dict[str, Driver] = {}
        for job in Jobs(storage).open():
            for model in Jobs(storage).entry(job).models:
                run = Run(storage, job, model)
                if only is not None and run.name not in only:
                    continue
                status, _ = run.status()
                beat = run.heartbeat(status.attempt) if status.state in ACTIVE else None
                if beat and beat.phase != "starting":  # else there is nothing to save
                    run.send_command("stop", status.attempt, reason)
                    leaving[run.name] = backend.find(job, model, status.attempt)
        deadline = time.monotonic() + LEAVE_SECONDS
        while leaving and may_wait() and time.monotonic() < deadline:
            for name in [name for name, driver in leaving.items() if driver.poll() is not None]:
                tell(f"{name} has ended")
                del leaving[name]
            time.sleep(LOOK_SECONDS)


@contextmanager
def interruptions() -> Iterator[Callable[[], int]]:
    """How often SIGINT or SIGTERM came."""
    count = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
