"""Provide scripted drivers for tests of the supervisor: each writes the run's objects as a real driver would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from genmodels.runs.records import Heartbeat, Result
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.dispatch.backends import base
from services.dispatch.backends.base import LOST, Capacity
from tests.support.storages import save

Script = Callable[[Run, int], Iterator[object]]  # the actions of a driver; each `yield` ends one poll


class Driver(base.Driver):
    def __init__(self, steps: Iterator[object]) -> None:
        self.steps, self.code, self.killed = steps, None, False

    def poll(self) -> int | None:
        if self.code is None:
            try:
                next(self.steps)
            except StopIteration as end:
                self.code = end.value or 0
        return self.code

    def kill(self) -> None:
        self.code, self.killed = -9, True


class Drivers:
    """Act as a backend whose driver n follows script n; the last script repeats."""

    def __init__(self, storage: Storage, *scripts: Script) -> None:
        self.storage, self.scripts = storage, list(scripts)
        self.attempts: list[int] = []
        self.drivers: list[Driver] = []

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        assert storage_url == self.storage.url
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self.attempts.append(attempt)
        self.drivers.append(Driver(script(Run(self.storage, job, model), attempt)))
        return self.drivers[-1]

    def find(self, job: str, model: str, attempt: int) -> Driver:
        driver = Driver(iter(()))
        driver.code = LOST
        return driver

    def capacity(self) -> Capacity:
        return Capacity(cpus=2, gpus=0)


def ends(outcome: Any, cause: Any = None, message: str = "", saves: bool = False, **more: Any) -> Script:
    """Return a driver that trains, saves a checkpoint if `saves`, and writes this result."""

    def script(run: Run, attempt: int) -> Iterator[object]:
        run.write_heartbeat(attempt, Heartbeat(phase="starting"))
        yield
        run.start_attempt(attempt, (run.checkpoints() or [None])[-1], 1)
        run.write_heartbeat(attempt, Heartbeat(phase="training", step=attempt * 10 - 9))
        yield
        if saves:
            save(run, attempt, attempt * 10)
        run.write_result(
            attempt, Result(outcome=outcome, cause=cause, message=message or f"{outcome} {attempt}", **more)
        )

    return script


def succeeds(run: Run, attempt: int) -> Iterator[object]:
    yield from ends("stopped", saves=True)(run, attempt)
    run.write_heartbeat(attempt, Heartbeat(phase="publishing"))
    yield
    run.write_result(attempt, Result(outcome="succeeded", version=3, message="published as model@3"))


def dies(run: Run, attempt: int) -> Iterator[object]:
    yield
    return 137


def obedient(run: Run, attempt: int) -> Iterator[object]:
    """Train until a command to stop comes, then save, which takes a while."""
    run.start_attempt(attempt, None, 1)
    run.write_heartbeat(attempt, Heartbeat(phase="training", step=7))
    while not run.commands(attempt):
        yield
    for _ in range(5):
        yield
    save(run, attempt, 8)
    run.write_result(attempt, Result(outcome="stopped", step=8))


def stubborn(run: Run, attempt: int) -> Iterator[object]:
    run.start_attempt(attempt, None, 1)
    run.write_heartbeat(attempt, Heartbeat(phase="training", step=7))
    while True:
        yield
