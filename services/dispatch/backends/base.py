"""Where drivers run: as processes of this machine, or as Ray Jobs of a cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from genmodels.runs.records import Heartbeat, Status
from services.cluster.environment import python


def submission_id(job: str, model: str, attempt: int) -> str:
    """What Ray calls an attempt: short enough for Kubernetes, and no two (job, model) share it.

    Ray refuses an id it has seen, so asking twice starts one driver.
    """
    return f"r-{hashlib.sha256(f'{job}/{model}'.encode()).hexdigest()[:12]}-a{attempt}"


def driver_command(storage_url: str, job: str, model: str, attempt: int, workers: int) -> list[str]:
    what = ("--storage", storage_url, "--job", job, "--model", model)
    return python("train", *what, "--attempt", str(attempt), "--workers", str(workers))


LOST = -1  # what a driver polls as whom nobody knows, since its cluster has gone


PREEMPTED = -1000  # what one polls as whose pods were taken away for more important ones; no signal has this number


Watch = Callable[[Status, Heartbeat | None], None]


@dataclass(frozen=True)
class Capacity:
    """What a cluster has for workers, and what it may grow to where it can grow.

    `unlimited`: there is always room, or somebody else sees to it that there is (Kueue, nodes that autoscale).
    """

    cpus: int
    gpus: int
    max_cpus: int = 0
    max_gpus: int = 0
    unlimited: bool = False


class Driver(Protocol):
    """A driver that was started.

    Attributes:
        waiting: what it waits for, however long, before it can begin or has ended; such a silence is no hang.
        reason: how it ended, where more is known than the code.
    """

    waiting: str = ""
    reason: str = ""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs or nobody can tell."""

    def kill(self) -> None:
        """End it and everything it started, at once."""


class Backend(Protocol):
    """Where drivers run."""

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver: ...

    def find(self, job: str, model: str, attempt: int) -> Driver:
        """One that was started earlier, maybe by another process; one that nobody knows polls as LOST."""

    def capacity(self) -> Capacity | None:
        """None: the cluster does not answer."""
