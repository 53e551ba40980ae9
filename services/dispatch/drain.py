"""Drain a process that runs attempts: have them save and stop before the process ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress

from genmodels.errors import GenmodelsError
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import ACTIVE
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.cluster.processes import PrintLine
from services.dispatch.attempt import STOP_SECONDS
from services.dispatch.backends.base import Driver
from services.dispatch.backends.ray_jobs import RayJobsBackend

LOOK_SECONDS = 0.2


def drain(
    storage: Storage,
    backend: RayJobsBackend,
    reason: str,
    print_line: PrintLine,
    may_wait: Callable[[], bool],
    only: Collection[str] | None = None,
) -> None:
    """Have attempts save and stop, and wait until their drivers have ended. Without the storage nothing can be saved.

    Args:
        may_wait: return False to stop waiting.
        only: names of runs, job/model; default: all open runs.
    """
    if not may_wait():
        return
    with suppress(GenmodelsError):
        draining: dict[str, Driver] = {}
        for job in Jobs(storage).open():
            for model in Jobs(storage).entry(job).models:
                run = Run(storage, job, model)
                if only is not None and run.name not in only:
                    continue
                status, _ = run.status()
                heartbeat = run.heartbeat(status.attempt) if status.state in ACTIVE else None
                if heartbeat and heartbeat.phase != "starting":  # else there is nothing to save
                    run.send_command("stop", status.attempt, reason)
                    draining[run.name] = backend.find(job, model, status.attempt)
        deadline = time.monotonic() + STOP_SECONDS
        while draining and may_wait() and time.monotonic() < deadline:
            for name in [name for name, driver in draining.items() if driver.poll() is not None]:
                print_line(f"{name} has ended")
                del draining[name]
            time.sleep(LOOK_SECONDS)
