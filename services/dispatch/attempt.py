"""Watch one attempt: detect hangs, request its end, and kill it when it does not end in time."""

from __future__ import annotations

import time
from typing import Literal

from genmodels.runs.records import Command, Heartbeat
from services.cluster.settings import settings
from services.dispatch.backends.base import Driver

STOP_SECONDS = 60.0  # for an attempt to save and end before it is killed; longer where ten steps take longer
KILL_SECONDS = 20.0  # for the ranks to write their stacks before the driver is killed too
HANG_STEPS = 10
SLOW_PHASES = ("starting", "compiling", "publishing")
MAX_SILENCE_SECONDS = 5.0  # that a silence between two looks counts at most: the store or this process was away


class AttemptMonitor:
    """An attempt that runs: its driver, the time since its last progress, and the command to end it.

    Attributes:
        ending: the action of the command to end it; None: it is to continue.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.ending: Literal["stop", "kill"] | None = None
        self._ending_seconds = 0.0  # since the command to end
        self._last_heartbeat: Heartbeat | None = None
        self._silence = 0.0  # seconds without progress
        self._looked = self._next_kill = time.monotonic()

    def request_stop(self, command: Command) -> None:
        """Remember a command to end: a kill replaces a stop."""
        if command.action == "kill" and self.ending != "kill":
            self.ending, self._ending_seconds = "kill", 0.0
        elif command.action == "stop" and not self.ending:
            self.ending = "stop"

    def observe(self, heartbeat: Heartbeat | None, rest: float = 0.0) -> float:
        """Compare with the latest heartbeat; return the seconds without progress; an outage adds few.

        Args:
            rest: seconds since the last look that were meant to pass without one.
        """
        now = time.monotonic()
        elapsed = min(now - self._looked, rest + MAX_SILENCE_SECONDS)
        self._looked = now
        is_silent = heartbeat == self._last_heartbeat and not self.driver.waiting
        self._silence = self._silence + elapsed if is_silent else 0.0
        self._last_heartbeat = heartbeat
        if self.ending:
            self._ending_seconds += elapsed
        return self._silence

    def kill_if_overdue(self, heartbeat: Heartbeat) -> None:
        """Kill an attempt that did not stop on request. Before training begins there is nothing to save."""
        is_closing = heartbeat.phase in ("saving", "publishing") and self._silence <= hang_timeout(heartbeat)
        if self.ending == "stop" and is_closing:
            return  # it ends by itself soon
        stop_seconds = max(STOP_SECONDS, HANG_STEPS * (heartbeat.step_seconds or 0))
        limit = KILL_SECONDS if self.ending == "kill" else stop_seconds
        is_overdue = self._ending_seconds > limit or (self.ending == "stop" and heartbeat.phase == "starting")
        if is_overdue and time.monotonic() >= self._next_kill:
            self._next_kill = time.monotonic() + KILL_SECONDS
            self.driver.kill()


def hang_timeout(heartbeat: Heartbeat) -> float:
    """Return the seconds without progress after which an attempt counts as hanging."""
    limits = settings()
    seconds = limits.slow_seconds if heartbeat.phase in SLOW_PHASES else limits.hang_seconds
    return max(seconds, HANG_STEPS * (heartbeat.step_seconds or 0.0))
