"""What a driver looks after while Ray has its main thread: commands, SIGTERM, a newer attempt, the first heartbeats."""

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

FENCE_SECONDS = 5.0  # between two looks for a newer attempt, and between two beats while the group starts
FLUSH_SECONDS = 3.0
SUPERSEDED = 76  # exit code of a driver whose attempt was taken over


class DriverWatch(CommandWatcher):
    """Between `training` and `trained` it sees to it that the attempt ends when it has to.

    SIGTERM becomes a command to leave, so that there is one way to end gracefully. A driver whose group has not begun
    leaves by itself; one whose attempt was taken over ends and leaves no result.
    """

    def __init__(self, run: Run, attempt: int, logs: LogShipper) -> None:
        # the ranks go first: then the driver learns of their end and says so in a result
        super().__init__(run, attempt, logs, kill_seconds=5 * KILL_SECONDS)
        self.terminated = threading.Event()
        self.busy = threading.Lock()  # held for a look, so that none is under way after `trained`
        self.in_training = self.stop_sent = False
        self.beat: tuple[Heartbeat, str] | None = None  # the latest and its etag, while only the driver beats
        self.fenced = time.monotonic()

    def catch_sigterm(self) -> None:
        """Handle SIGTERM; to be called again after `ray.init`, which has a handler of its own."""
        signal.signal(signal.SIGTERM, lambda *_: self.terminated.set())

    def training(self, max_steps: int) -> None:
        """The group is about to be started."""
        first = Heartbeat(phase="starting", max_steps=max_steps)
        self.beat = first, self.run.write_heartbeat(self.attempt, first)
        self.in_training = True

    def trained(self) -> None:
        with self.busy:
            self.in_training, self.beat = False, None

    def look(self) -> None:
        with self.busy:
            super().look()
            if self.in_training and self.terminated.is_set() and not (self.stop_sent or self.should_stop.is_set()):
                self.run.send_command("stop", self.attempt, "the driver was told to end (SIGTERM)")
                self.stop_sent = True
                super().look()
            if not self.in_training:
                return
            if self.should_stop.is_set() and self._group_has_not_begun():
                self._leave()
            if time.monotonic() - self.fenced >= FENCE_SECONDS:
                self._fence()
                self._group_has_not_begun()
                self.fenced = time.monotonic()

    def _group_has_not_begun(self) -> bool:
        """Beat for a group that is not there yet. Once rank 0 has beaten, this one's beat no longer goes through."""
        if self.beat is None:
            return False
        last, etag = self.beat
        beat = last.model_copy(update={"progress_count": last.progress_count + 1})
        try:
            self.beat = beat, self.run.write_heartbeat(self.attempt, beat, if_match=etag)
        except Conflict:
            self.beat = None
        return self.beat is not None

    def _leave(self) -> None:
        step = max((ref.step for ref in self.run.checkpoints()), default=0)
        message = f"left before its workers had begun; continues from step {step}"
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
        """End at once: Ray ends what the driver started."""
        self.logs.flush(FLUSH_SECONDS)
        os._exit(code)
