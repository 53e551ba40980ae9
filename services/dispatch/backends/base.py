"""The interface of backends, which run drivers: processes of this machine, Ray Jobs, or RayJobs on Kubernetes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from genmodels.runs.records import Heartbeat, Status
from services.cluster.environment import python


def submission_id(job: str, model: str, attempt: int) -> str:
    """Return Ray's id of an attempt: short enough for Kubernetes, and different for each (job, model, attempt).

    Ray refuses an id it has seen, so asking twice starts one driver.
    """
    return f"r-{hashlib.sha256(f'{job}/{model}'.encode()).hexdigest()[:12]}-a{attempt}"


def driver_command(storage_url: str, job: str, model: str, attempt: int, workers: int) -> list[str]:
    what = ("--storage", storage_url, "--job", job, "--model", model)
    return python("train", *what, "--attempt", str(attempt), "--workers", str(workers))


LOST = -1  # exit code of an unknown driver: its cluster has gone


PREEMPTED = -1000  # exit code of a driver whose pods were preempted; no signal has this number


Watch = Callable[[Status, Heartbeat | None], None]


@dataclass(frozen=True)
class Capacity:
    """What a cluster has for workers, and what it may grow to.

    `unlimited`: there is always room, or Kueue or an autoscaler of nodes makes room.
    """

    cpus: int
    gpus: int
    max_cpus: int = 0
    max_gpus: int = 0
    unlimited: bool = False


class Driver(Protocol):
    """A driver that was started.

    Attributes:
        waiting: what it waits for before it can begin or end; a silence meanwhile is no hang.
        reason: how it ended, if more is known than the exit code.
    """

    waiting: str = ""
    reason: str = ""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs or its state is unknown."""

    def kill(self) -> None:
        """End it and everything it started, at once."""


class Backend(Protocol):
    """Where drivers run."""

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver: ...

    def find(self, job: str, model: str, attempt: int) -> Driver:
        """Return a driver that was started earlier, maybe by another process; an unknown driver polls as LOST."""

    def capacity(self) -> Capacity | None:
        """None: the cluster does not answer."""
