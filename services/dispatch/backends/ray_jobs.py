"""Run drivers as Ray Jobs, through the HTTP API of Ray's dashboard.

A driver asks for DRIVER_MEMORY, so Ray starts it on any node that has so much memory left: the head first, then the
others. Ray keeps a driver without a place as PENDING. That is rare: the dispatcher starts only as many as fit.
"""

from __future__ import annotations

import logging
import shlex
import signal
import time
from typing import Any

import httpx

from services.cluster.dashboard import Dashboard
from services.cluster.ray_start import MEMORY_LABEL
from services.dispatch.backends.base import (
    DRIVER_MEMORY,
    LOST,
    Backend,
    Capacity,
    Driver,
    driver_command,
    submission_id,
)

log = logging.getLogger("genmodels.backends")


SUBMIT_SECONDS = 15.0  # the dashboard waits up to 10 s for its agent


MESSAGE = 2000  # characters of Ray's own message, which ends with the last lines of the driver's log


ACCEPT_SECONDS = 60.0  # for a driver to be accepted, by a cluster that answers


PENDING_SECONDS = 30.0  # a driver that has a place starts sooner


class RayJobsBackend(Backend):
    """Run drivers as Ray Jobs, only through the HTTP API of Ray's dashboard.

    So the calling process is no part of the cluster, does not import Ray, and survives the loss of the cluster. No
    call takes longer than its timeout, and none raises for an unreachable cluster: an unknown value is None.
    """

    def __init__(self, address: str | None = None, max_cpus: int = 0, max_gpus: int = 0) -> None:
        """Args:
        address: of the dashboard; see `Dashboard`.
        max_cpus: CPUs that the cluster may grow to, if it can grow.
        """
        self.dashboard = Dashboard(address)
        self.max_cpus, self.max_gpus = max_cpus, max_gpus
        self._head_began = 0  # ms since 1970, at the last `capacity`
        self._alive: set[str] = set()  # ids of nodes, at the last `capacity`

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        """Submit a driver. If no answer comes, `poll` submits it again."""
        submission = {
            "entrypoint": shlex.join(driver_command(storage_url, job, model, attempt, workers)),
            "submission_id": submission_id(job, model, attempt),
            "metadata": {"job": job, "model": model, "attempt": str(attempt)},
            "entrypoint_num_cpus": 0,
            "entrypoint_memory": DRIVER_MEMORY,
        }
        return _RayJob(self, submission_id(job, model, attempt), submission)

    def find(self, job: str, model: str, attempt: int) -> Driver:
        return _RayJob(self, submission_id(job, model, attempt))

    def is_lost(self, job: dict[str, Any]) -> bool:
        """Tell whether a Ray Job was lost with its node. `job`: as the dashboard shows it.

        A head that keeps its state on disk still shows the drivers on the previous head as running.
        """
        if job["status"] not in ("PENDING", "RUNNING"):
            return False
        if node := job.get("driver_node_id"):  # one that is not known may have joined since the nodes were listed
            return node not in self._alive and self.capacity() is not None and node not in self._alive
        return bool((job.get("start_time") or 0) < self._head_began)

    def capacity(self) -> Capacity | None:
        answer = self.dashboard.ask("GET", "/api/v0/nodes?detail=1&limit=10000&timeout=4")
        if answer is None or answer.status_code != 200:
            return None
        try:
            nodes: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
            alive = [node for node in nodes if node["state"] == "ALIVE"]
            there = [node["resources_total"] for node in alive]
            memory, gpu_memory = (_largest_memory(alive, resource) for resource in ("CPU", "GPU"))
            self._alive = {node["node_id"] for node in alive}
            self._head_began = max((node["start_time_ms"] for node in alive if node["is_head_node"]), default=0)
        except (ValueError, KeyError, TypeError):  # another server answers at this address
            return None
        if not there:
            return None  # the head is still starting
        cpus, gpus = (int(sum(resources.get(name, 0) for resources in there)) for name in ("CPU", "GPU"))
        drivers = sum(int(resources.get("memory", 0) // DRIVER_MEMORY) for resources in there)
        may_grow = self.max_cpus > cpus or self.max_gpus > gpus
        if may_grow:  # by nodes of a size that is not known
            return Capacity(cpus, gpus, self.max_cpus, self.max_gpus)
        return Capacity(cpus, gpus, self.max_cpus, self.max_gpus, drivers=drivers, memory=memory, gpu_memory=gpu_memory)


def _largest_memory(nodes: list[dict[str, Any]], resource: str) -> int | None:
    """Return the most bytes of memory that a node with such a resource has; None if one of them does not tell."""
    having = [node for node in nodes if node["resources_total"].get(resource)]
    known = [int(label) for node in having if (label := (node.get("labels") or {}).get(MEMORY_LABEL))]
    return max(known) if known and len(known) == len(having) else None


class _RayJob(Driver):
    """One Ray Job. Each poll repeats a request (start, stop) that was not answered."""

    def __init__(self, backend: RayJobsBackend, name: str, submission: dict[str, Any] | None = None) -> None:
        self.backend, self.dashboard, self.name = backend, backend.dashboard, name
        self.submission, self.deadline = submission, time.monotonic() + ACCEPT_SECONDS
        self.code: int | None = None
        self.answer: httpx.Response | None = None  # that `look` got for the next `poll`
        self.stopping = False
        self.pending_since = time.monotonic()
        self._submit()

    def look(self) -> None:
        if self.code is None:
            self.answer = self._ask()

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        answer, self.answer = self.answer or self._ask(), None
        if answer is None or answer.status_code not in (200, 404):
            return None
        if answer.status_code == 404:
            self.code = self._missing()
            return self.code
        self.submission = None
        job = answer.json()
        is_pending = job["status"] == "PENDING" and time.monotonic() - self.pending_since > PENDING_SECONDS
        self.waiting = (
            f"waits for a node with {DRIVER_MEMORY // 2**20} MiB of memory for its driver" if is_pending else ""
        )
        match job["status"]:
            case "SUCCEEDED":
                self.code = 0
            case "FAILED":
                self.code = job.get("driver_exit_code") or LOST
                log.warning("Ray job %s failed: %s", self.name, (job.get("message") or "")[-MESSAGE:])
            case "STOPPED":
                self.code = -signal.SIGTERM
            case _ if self.backend.is_lost(job):
                self.code = LOST
            case _ if self.stopping:
                self._stop()
        return self.code

    def kill(self) -> None:
        """Stop the driver's whole process tree: SIGTERM, and after the cluster's RAY_JOB_STOP_WAIT_TIME_S SIGKILL.

        `poll` tells when the driver has ended.
        """
        self.submission = None
        self._stop()

    def _ask(self) -> httpx.Response | None:
        return self.dashboard.ask("GET", f"/api/jobs/{self.name}")

    def _missing(self) -> int | None:
        """Handle a job that the cluster does not know: lost with its head, or never accepted."""
        if self.submission is None or time.monotonic() > self.deadline:
            return LOST
        self._submit()
        return None

    def _submit(self) -> None:
        if self.submission is None:
            return
        answer = self.dashboard.ask("POST", "/api/jobs/", self.submission, SUBMIT_SECONDS)
        if answer is not None and answer.status_code == 200:
            self.submission = None

    def _stop(self) -> None:
        answer = self.dashboard.ask("POST", f"/api/jobs/{self.name}/stop")
        self.stopping = answer is None or answer.status_code >= 500
