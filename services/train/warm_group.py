"""The worker group of a driver that takes attempts in turn: Ray Train's workers, which wait for the next attempt.

To start a group takes many seconds, in which about eight processes mostly import. So a group is kept after an attempt
that ended well, for the next attempt of the same shape. The group of an attempt that failed ends: Ray ends it, or the
driver ends with all that it started.
"""

from __future__ import annotations

import gc
import tempfile
import threading
from typing import Any, NamedTuple

import torch

from genmodels.spec.sections import ModelSpec
from genmodels.storage import open_storage
from genmodels.training.attempt import work
from genmodels.training.sharding import is_sharded
from services.train.control import DriverWatch
from services.train.driver import connect, ray_group, trainer
from services.train.turn_queue import Turn, TurnQueue

LOOK_SECONDS = 0.2  # between two looks whether a group has failed
END_SECONDS = 10.0  # that a group has to end by itself


class Shape(NamedTuple):
    """What a worker group cannot change."""

    storage: str
    workers: int
    use_gpu: bool


class WarmGroup:
    """At most one worker group. Use as a context manager."""

    def __init__(self) -> None:
        self._group: _Group | None = None

    def __enter__(self) -> WarmGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def train(
        self, storage_url: str, job: str, spec: ModelSpec, attempt: int, workers: int, watch: DriverWatch
    ) -> None:
        """Train one attempt, in the group of the attempt before if it has the same shape."""
        shape = Shape(storage_url, workers, spec.scaling.use_gpu)
        if self._group is None or self._group.shape != shape or not self._group.is_alive:
            self._end()
            connect(watch)
            self._group = _Group(shape)
        self._group.train(Turn(job, spec.name, attempt))
        if is_sharded(spec.train) or spec.train.compile:
            self._end()  # meshes of processes and compiled code stay in a process, and might change the next attempt

    def _end(self) -> None:
        if self._group:
            self._group.end()
        self._group = None


class _Group:
    def __init__(self, shape: Shape) -> None:
        import ray

        self.shape = shape
        self._queue: Any = ray.remote(num_cpus=0)(TurnQueue).remote(shape.workers)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="worker-group", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def train(self, turn: Turn) -> None:
        import ray

        done = self._queue.give.remote(turn)
        while not ray.wait([done], timeout=LOOK_SECONDS)[0]:
            if not self.is_alive:
                raise self._error or RuntimeError("the worker group has ended")
        ray.get(done)

    def end(self) -> None:
        """Let the workers return; their resources are then free."""
        self._queue.give.remote(None)
        self._thread.join(END_SECONDS)

    def _fit(self) -> None:
        storage, workers, use_gpu = self.shape
        config = {"storage": storage, "queue": self._queue}
        try:
            with tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as scratch:
                trainer(work_in_turn, config, workers, scratch, "turns", use_gpu=use_gpu).fit()
        except BaseException as error:
            self._error = error


def work_in_turn(config: dict[str, Any]) -> None:
    """Run one Ray Train worker: carry out the attempts of the queue, one after the other.

    The process group stays. Nothing else of an attempt may change the next one: each builds its model, and each step
    seeds the random numbers.
    """
    import ray

    queue, number = config["queue"], 0
    while turn := ray.get(queue.take.remote(number)):
        work(open_storage(config["storage"], in_use=True), turn.job, turn.model, turn.attempt, ray_group())
        gc.collect()  # before the next model takes memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        ray.get(queue.done.remote(number))
        number += 1
