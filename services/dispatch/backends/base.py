"""Define the interface of backends. They run drivers: local processes, Ray Jobs, or RayJobs on Kubernetes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from genmodels.runs.records import Heartbeat, Status
from services.cluster.environment import python


def submission_id(job: str, model: str, attempt: int) -> str:
    """Return Ray's id of an attempt: short enough for Kubernetes, and different for each (job, model, attempt).

    Ray refuses an id that it already knows, so two submissions start one driver.
    """
    return f"r-{hashlib.sha256(f'{job}/{model}'.encode()).hexdigest()[:12]}-a{attempt}"


def driver_command(storage_url: str, job: str, model: str, attempt: int, workers: int) -> list[str]:
    return python("train", *_attempt(storage_url, job, model, attempt), "--workers", str(workers))


def turns_command(channel: int) -> list[str]:
    """Return the command of a driver that takes attempts in turn, from a socket that it inherits."""
    return python("train.turns", str(channel))


def pre_stop_command(storage_url: str, job: str, model: str, attempt: int) -> list[str]:
    """Return the command with which an attempt saves before its pod ends, without its `--seconds`."""
    return python("train.pre_stop", *_attempt(storage_url, job, model, attempt))


def _attempt(storage_url: str, job: str, model: str, attempt: int) -> tuple[str, ...]:
    return "--storage", storage_url, "--job", job, "--model", model, "--attempt", str(attempt)


LOST = -1  # exit code of an unknown driver: its cluster has gone


PREEMPTED = -1000  # exit code of a driver whose pods were preempted; no signal has this number


REFUSED = -1001  # exit code of a driver that no attempt can start: the template of its RayJob, or its image, is wrong


# Bytes that a driver asks of its node. Measured on `genmodels up` with a GAN and a mini-GPT of jobs/quickstart.yaml: at
# its peak a driver has 581 to 665 MiB resident, of which 400 to 495 MiB are its own, and Ray's supervisor of it 83 MiB.
DRIVER_MEMORY = 768 * 2**20


Watch = Callable[[Status, Heartbeat | None], None]


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs that a cluster has for workers, and the numbers that it may grow to.

    `unlimited`: there is always room, or Kueue or an autoscaler of nodes makes room.
    `drivers`: for which the nodes have memory; None: no limit.
    `memory`, `gpu_memory`: bytes of the largest machine or pod for workers, without and with GPUs; None: not known.
    """

    cpus: int
    gpus: int
    max_cpus: int = 0
    max_gpus: int = 0
    unlimited: bool = False
    drivers: int | None = None
    memory: int | None = None
    gpu_memory: int | None = None


class Driver(Protocol):
    """A driver of one attempt, already started.

    Attributes:
        waiting: what the driver waits for before it can begin or end; silence during this wait is no hang.
        problem: what is wrong with a driver that has not ended; silence meanwhile is a hang as always.
        reason: how the driver ended, if more than the exit code is known.
    """

    waiting: str = ""
    problem: str = ""
    reason: str = ""

    def look(self) -> None:
        """Ask for what the next `poll` returns, where that takes a request for each driver; many threads may look."""
        return  # most backends ask once for all drivers

    def poll(self) -> int | None:
        """Return the driver's exit code, or None while it runs or its state is unknown."""

    def kill(self) -> None:
        """End the driver and all that it started, at once."""


class Backend(Protocol):
    """Start drivers and find them again."""

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver: ...

    def find(self, job: str, model: str, attempt: int) -> Driver:
        """Return a driver that was started earlier, maybe by another process; an unknown driver polls as LOST."""

    def capacity(self) -> Capacity | None:
        """Return the capacity of the cluster, or None if the cluster does not answer."""

    def stalled(self) -> str | None:
        """Return why a background thread of the backend makes no progress; None if all do."""
        return None
