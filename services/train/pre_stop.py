"""Have an attempt save before its pod ends: the preStop hook of the pods of a RayJob.

    python -m services.train.pre_stop --storage URL --job JOB --model MODEL --attempt N --seconds S

Kubernetes ends the pods of a preempted, drained or deleted run all at once. It sends SIGTERM to a container when the
container's hook has ended, so while the hooks wait, driver and workers live: they read the stop command, save, and the
driver writes the result. The grace period of the pod limits the wait.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time

from genmodels.errors import DamagedObject, GenmodelsError, StorageUnavailable
from genmodels.runs.records import ACTIVE
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.cluster.logs import log_to_stderr

LOOK_SECONDS = 0.5
LAST_LOOK_SECONDS = 2.0  # for a look that began in time

log = logging.getLogger("genmodels")


def save_first(run: Run, attempt: int, seconds: float, reason: str) -> bool:
    """Have the attempt stop, and wait until nothing is left to save; return False if `seconds` were not enough."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            sent = {command.action for command in run.commands(attempt)}
            if "kill" in sent or run.result(attempt) or not _has_begun(run, attempt) or _is_over(run, attempt):
                return True
            if "stop" not in sent:  # one for all hooks of the run; a stop of the dispatcher does as well
                run.send_command("stop", attempt, reason)
        except StorageUnavailable as outage:
            log.warning("%s", outage)
        time.sleep(LOOK_SECONDS)
    return False


def _has_begun(run: Run, attempt: int) -> bool:
    heartbeat = run.heartbeat(attempt)
    return heartbeat is not None and heartbeat.phase != "starting"


def _is_over(run: Run, attempt: int) -> bool:
    """Tell whether the dispatcher has seen the attempt's end: a driver that died leaves no result."""
    try:
        status, _ = run.status()
    except DamagedObject:
        return False  # not known
    return status.attempt > attempt or (status.attempt == attempt and status.state not in ACTIVE)


def end_after(seconds: float) -> None:
    """End this process then, whatever it waits for: a request to the storage has its own, longer timeouts."""

    def end() -> None:
        print("error: the storage has not answered in time", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def main() -> int:
    log_to_stderr()
    parser = argparse.ArgumentParser(description="Have an attempt save before its pod ends.")
    for name in ("storage", "job", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="that the attempt may take to save and end")
    options = parser.parse_args()
    end_after(options.seconds + LAST_LOOK_SECONDS)
    try:
        run = Run(open_storage(options.storage, in_use=True), options.job, options.model)
        reason = f"pod {os.environ.get('HOSTNAME', '')} is ending"
        if save_first(run, options.attempt, options.seconds, reason):
            return 0
        print(f"error: the attempt has not ended after {options.seconds:.0f} s", file=sys.stderr)
    except GenmodelsError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1  # Kubernetes records an event FailedPreStopHook


if __name__ == "__main__":
    sys.exit(main())
