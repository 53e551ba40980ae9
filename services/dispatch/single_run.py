"""Bring one run to its end in this process, without a dispatcher: what `genmodels run` does."""

from __future__ import annotations

import contextlib
import time

from genmodels.errors import LeaseLost, StorageUnavailable
from genmodels.runs.records import ENDED, Result, Status
from genmodels.runs.store import Run
from genmodels.storage import Storage
from genmodels.storage.disk import outage_of_disk
from genmodels.storage.retry import retry_until_available
from services.dispatch.attempt import STOP_SECONDS
from services.dispatch.backends.base import Backend, Watch
from services.dispatch.supervisor import Supervisor

POLL_SECONDS = 0.5


def run_to_completion(
    storage: Storage, backend: Backend, job: str, model: str, workers: int, watch: Watch
) -> tuple[Status, Result | None]:
    """Bring one run to its end from any state. A run that succeeded or failed its gate stays as it is.

    Raises:
        KeyboardInterrupt: Ctrl-C; the attempt has saved and stopped, and the run is queued again.
        LeaseLost: another dispatcher works on this run.
    """
    run = Run(storage, job, model)
    status, etag = retry_until_available(run.status)
    result = retry_until_available(lambda: run.result(status.attempt)) if status.attempt else None
    if status.state == "succeeded" or (status.state == "failed" and result and result.cause == "gate"):
        return status, result
    # The user starts the run again: earlier attempts do not count.
    status = status.model_copy(update={"no_progress_attempts": 0, "out_of_memory_attempts": 0})
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
                supervisor.show_outage(outage)  # the next round tries again
            time.sleep(POLL_SECONDS)
    except BaseException as interruption:
        is_ctrl_c = isinstance(interruption, KeyboardInterrupt)
        interrupt(supervisor, "stopped by Ctrl-C" if is_ctrl_c else f"stopped: {interruption}")
        raise


def interrupt(supervisor: Supervisor, reason: str) -> None:
    """Let the attempt save and end, and wait for its end; kill it if it takes too long or cannot save."""
    run, attempt, driver = supervisor.run, supervisor.status.attempt, supervisor.driver
    try:
        if driver and driver.poll() is None:
            run.send_command("stop", attempt, reason)
        deadline = time.monotonic() + STOP_SECONDS
        while driver and driver.poll() is None and time.monotonic() < deadline:
            heartbeat = run.heartbeat(attempt)
            if heartbeat is None or heartbeat.phase == "starting":
                break  # nothing was trained yet: there is nothing to save
            time.sleep(POLL_SECONDS)
    except (KeyboardInterrupt, StorageUnavailable):
        pass  # while the store is away nothing can be saved
    finally:
        if driver and driver.poll() is None:
            driver.kill()
    if supervisor.active:
        with contextlib.suppress(StorageUnavailable, LeaseLost):  # the state stays until the run is started again
            supervisor.requeue(reason)
