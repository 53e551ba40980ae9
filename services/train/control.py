"""Watch a driver while Ray occupies its main thread: commands, SIGTERM, a newer attempt, the first heartbeats."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

from genmodels.errors import Conflict, Superseded
from genmodels.runs.control import KILL_SECONDS, CommandWatcher
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Heartbeat, Result
from genmodels.runs.store import Run

log = logging.getLogger("genmodels")

FENCE_SECONDS = 5.0  # between two looks for a newer attempt, and between two heartbeats while the group starts
RANK_0_SECONDS = 30.0  # between two looks while rank 0 reads the commands and looks for a newer attempt at each save
FLUSH_SECONDS = 3.0
SUPERSEDED = 76  # exit code of a driver whose attempt was taken over


class DriverWatch(CommandWatcher):
    """End the attempt when it has to end, between `training` and `trained`. While rank 0 works, look rarely.

    SIGTERM becomes a stop command, so that there is one way to end gracefully. A driver whose workers have not started
    stops by itself. A driver whose attempt was taken over ends and writes no result.
    """

    def __init__(self, run: Run, attempt: int, logs: LogShipper) -> None:
        # the ranks end first: then the driver learns of their end and writes it into its result
        super().__init__(run, attempt, logs, kill_seconds=5 * KILL_SECONDS)
        self.terminated = threading.Event()
        self.busy = threading.Lock()  # held during a look, so that none continues after `trained`
        self.in_training = self.stop_sent = False
        self.own_heartbeat: tuple[Heartbeat, str] | None = None  # the latest and its etag, until rank 0 writes them
        self.looked = self.fenced = time.monotonic()

    def catch_sigterm(self) -> None:
        """Handle SIGTERM. Call this again after `ray.init`, which sets its own handler."""
        signal.signal(signal.SIGTERM, lambda *_: self.terminated.set())

    def training(self, max_steps: int) -> None:
        """Note that the worker group is about to start."""
        first = Heartbeat(phase="starting", max_steps=max_steps)
        self.own_heartbeat = first, self.run.write_heartbeat(self.attempt, first)
        self.in_training = True

    def trained(self) -> None:
        with self.busy:
            self.in_training, self.own_heartbeat = False, None

    def look(self) -> bool:
        with self.busy:
            if self._may_rest():
                return False
            self.looked = time.monotonic()
            is_new = super().look()
            if self._must_send_stop():
                self.run.send_command("stop", self.attempt, "the driver received SIGTERM")
                self.stop_sent = True
                is_new = super().look()
            if self.in_training:
                self._look_after_group()
            return is_new

    def _may_rest(self) -> bool:
        rank_0_looks = self.in_training and self.own_heartbeat is None
        return rank_0_looks and not self._must_send_stop() and time.monotonic() - self.looked < RANK_0_SECONDS

    def _must_send_stop(self) -> bool:
        asked = self.stop_sent or self.should_stop.is_set()
        return self.in_training and self.terminated.is_set() and not asked

    def _look_after_group(self) -> None:
        if self.should_stop.is_set() and self._group_has_not_started():
            self._stop()
        if time.monotonic() - self.fenced >= FENCE_SECONDS:
            self._fence()
            self._group_has_not_started()
            self.fenced = time.monotonic()

    def _group_has_not_started(self) -> bool:
        """Write a heartbeat for workers that have not started. After rank 0's first heartbeat this write is refused."""
        if self.own_heartbeat is None:
            return False
        last, etag = self.own_heartbeat
        heartbeat = last.model_copy(update={"progress_count": last.progress_count + 1})
        try:
            self.own_heartbeat = heartbeat, self.run.write_heartbeat(self.attempt, heartbeat, if_match=etag)
        except Conflict:
            self.own_heartbeat = None
        return self.own_heartbeat is not None

    def _stop(self) -> None:
        step = max((ref.step for ref in self.run.checkpoints()), default=0)
        message = f"stopped before its workers started; continues from step {step}"
        self.run.write_result(self.attempt, Result(outcome="stopped", message=message, step=step))
        log.info("%s", message)
        self._exit(0)

    def _fence(self) -> None:
        try:
            self.run.fence(self.attempt)
        except Superseded as error:
            log.error("%s; this driver ends", error)
            self._exit(SUPERSEDED)

    def _exit(self, code: int) -> None:
        """End at once: Ray ends the processes that the driver started."""
        self.logs.flush(FLUSH_SECONDS)
        os._exit(code)
