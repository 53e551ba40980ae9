"""Plan the queue: let queued runs start, running ones make room or grow, and show the order to the job API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import Queue, QueuedRun, write_queue
from genmodels.spec.sections import ModelSpec
from genmodels.storage.documents import now
from services.cluster.settings import settings
from services.dispatch.backends.base import Backend, Capacity
from services.dispatch.scheduler import Queued, Running, plan
from services.dispatch.supervisor import Supervisor

CAPACITY_SECONDS = 2.0  # for which an answer of the cluster is cached
RESERVE_SECONDS = 15.0  # a run whose back-off is no longer keeps its place
REWRITE_SECONDS = 30.0  # after which an unchanged queue is written again: the stored one may be damaged


@dataclass
class ManagedRun:
    """A run of an open job, under this dispatcher's lease."""

    spec: ModelSpec
    priority: int
    submitted: tuple[str, int]  # time of submission, and the model's place in the job
    supervisor: Supervisor
    backfilled: int = 0  # later runs that have started since this one could not
    room_since: float | None = None  # since when the run could grow

    @property
    def job(self) -> str:
        return self.supervisor.run.job

    def as_queued(self, key: str) -> Queued:
        """Return the run as the scheduler sees it while it waits."""
        back_off = self.supervisor.seconds_to_wait
        return Queued(
            key,
            self.priority,
            self.submitted,
            sizes=self.spec.world_sizes,
            use_gpu=self.spec.scaling.use_gpu,
            backfilled=self.backfilled,
            hold_reason="backs off after a failure" if back_off else "",
            reserves=0 < back_off <= RESERVE_SECONDS,  # otherwise another run would start, only to be preempted
        )

    def as_running(self, key: str, grow_worth_seconds: float) -> Running:
        """Return the run as the scheduler sees it while it has workers.

        Args:
            grow_worth_seconds: of training that must be left for a growth.
        """
        status, heartbeat = self.supervisor.status, self.supervisor.heartbeat
        seconds_left = (heartbeat.seconds_left if heartbeat else None) or 0.0
        return Running(
            key,
            self.priority,
            since=next((change.time for change in reversed(status.history) if change.state == "starting"), ""),
            sizes=self.spec.world_sizes,
            workers=status.workers,
            use_gpu=self.spec.scaling.use_gpu,
            stopping=self.supervisor.stopping,
            growable=status.state == "running" and seconds_left > grow_worth_seconds,
            placed=status.state != "starting",
        )

    def has_had_room(self, seconds: float) -> bool:
        """Return True once the run could have grown for `seconds`; each growth costs a restart."""
        now = time.monotonic()
        if self.room_since is None:
            self.room_since = now
        elif now - self.room_since >= seconds:
            self.room_since = None
            return True
        return False


class RunQueue:
    """Apply the scheduler's plan to the runs of a dispatcher."""

    def __init__(self, jobs: Jobs, backend: Backend) -> None:
        self.jobs, self.backend = jobs, backend
        self._capacity: tuple[float, Capacity | None] = (-CAPACITY_SECONDS, None)  # time of the request, and the answer
        self._written: tuple[float, Any] = (-REWRITE_SECONDS, None)  # when, and what

    def reset(self) -> None:
        """Forget what was written: another dispatcher may have written since."""
        self._written = (-REWRITE_SECONDS, None)

    def schedule(
        self, runs: Mapping[str, ManagedRun], start: Callable[[ManagedRun, int], None], holds_lease: Callable[[], bool]
    ) -> None:
        """Start, preempt and grow runs by the plan for this moment.

        Args:
            runs: by their names, job/model.
            start: start a run with so many workers.
        """
        limits = settings()
        queued = [run.as_queued(key) for key, run in runs.items() if run.supervisor.waits]
        active = [run.as_running(key, limits.grow_worth_seconds) for key, run in runs.items() if run.supervisor.active]
        capacity = self._current_capacity()
        if capacity is None:
            in_order = sorted(queued, key=lambda run: (-run.priority, run.submitted))
            reasons = [(run.key, run.hold_reason or "the cluster does not answer") for run in in_order]
            self._write(None, reasons, holds_lease)
            return
        todo = plan(queued, active, capacity)
        for key, workers in todo.starts:
            start(runs[key], workers)
        for key, reason in todo.preemptions:
            runs[key].supervisor.request_stop(reason)
        for key in todo.backfilled:
            runs[key].backfilled += 1
        grows = dict(todo.grows)
        for key, run in runs.items():
            if key not in grows:
                run.room_since = None
            elif run.has_had_room(limits.grow_seconds):
                run.supervisor.request_stop(grows[key])
        self._write(capacity, todo.reasons, holds_lease)

    def _current_capacity(self) -> Capacity | None:
        requested_at, capacity = self._capacity
        if time.monotonic() - requested_at >= CAPACITY_SECONDS:
            capacity = self.backend.capacity()
            self._capacity = time.monotonic(), capacity
        return capacity

    def _write(
        self, capacity: Capacity | None, reasons: list[tuple[str, str]], holds_lease: Callable[[], bool]
    ) -> None:
        """Write the order of the queue, and why each run waits, if it has changed."""
        names = ((*key.split("/"), reason) for key, reason in reasons)
        queue = [QueuedRun(job=job, model=model, reason=reason) for job, model, reason in names]
        total = None
        if capacity and not capacity.unlimited:
            total = {"cpus": max(capacity.cpus, capacity.max_cpus), "gpus": max(capacity.gpus, capacity.max_gpus)}
        memory = _worker_memory(capacity) if capacity else {}
        written, content = self._written
        is_due = content != (total, memory, queue) or time.monotonic() - written >= REWRITE_SECONDS
        if is_due and holds_lease():
            write_queue(self.jobs.storage, Queue(time=now(), capacity=total, worker_memory=memory, queue=queue))
            self._written = time.monotonic(), (total, memory, queue)


def _worker_memory(capacity: Capacity) -> dict[str, int]:
    """Return the known bytes of a machine for workers, by `cpus` and `gpus` like the capacity itself."""
    memory = {"cpus": capacity.memory, "gpus": capacity.gpu_memory}
    return {device: size for device, size in memory.items() if size is not None}
