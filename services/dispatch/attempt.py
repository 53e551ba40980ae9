"""TODO"""

from __future__ import annotations

import time
from typing import Literal

from genmodels.runs.records import Command, Heartbeat
from services.cluster.settings import settings
from services.dispatch.backends.base import Driver

LEAVE_SECONDS = 60.0  # for an attempt to save and end before it is killed; longer where ten steps take longer


KILL_SECONDS = 20.0  # for the ranks to write down their stacks before the driver is killed too


HANG_STEPS = 10


SLOW_PHASES = ("starting", "compiling", "publishing")


MAX_SILENCE_SECONDS = 5.0  # a silence between two looks counts for no more: the store or this process was away


class _Attempt:
    """An attempt that runs: its driver, for how long it has shown no progress, and whether it is to end."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.ending: Literal["stop", "kill"] | None = None
        self.pressed = 0.0  # for how long it has been asked to end
        self._seen: Heartbeat | None = None
        self._age = 0.0
        self._looked = self._next_kill = time.monotonic()

    def request_stop(self, command: Command) -> None:
        if command.action == "kill" and self.ending != "kill":
            self.ending, self.pressed = "kill", 0.0
        elif command.action == "stop" and not self.ending:
            self.ending = "stop"

    def grow_older(self, heartbeat: Heartbeat | None) -> float:
        """Seconds without a tick, as far as anyone could have seen one."""
        now = time.monotonic()
        passed = min(now - self._looked, MAX_SILENCE_SECONDS)
        self._looked = now
        self._age = self._age + passed if heartbeat == self._seen and not self.driver.waiting else 0.0
        self._seen = heartbeat
        if self.ending:
            self.pressed += passed
        return self._age

    def press(self, beat: Heartbeat) -> None:
        """Kill what has been asked to end and does not. What has not begun to train has nothing to save."""
        if self.ending == "stop" and beat.phase in ("saving", "publishing") and self._age <= _patience(beat):
            return  # it ends soon, and well
        limit = KILL_SECONDS if self.ending == "kill" else max(LEAVE_SECONDS, HANG_STEPS * (beat.step_seconds or 0))
        due = self.pressed > limit or (self.ending == "stop" and beat.phase == "starting")
        if due and time.monotonic() >= self._next_kill:
            self._next_kill = time.monotonic() + KILL_SECONDS
            self.driver.kill()


def _patience(beat: Heartbeat) -> float:
    """Seconds without a tick that make a hang."""
    limits = settings()
    slow = limits.slow_seconds if beat.phase in SLOW_PHASES else limits.hang_seconds
    return max(slow, HANG_STEPS * (beat.step_seconds or 0.0))
