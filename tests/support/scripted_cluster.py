"""Provide a backend whose attempts follow scripts, jobs for it, and checks of their runs at the end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import notify
from genmodels.runs.records import Heartbeat, Result, Status
from genmodels.runs.store import Run
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage
from services.dispatch import queue, retry_policy
from services.dispatch.backends.base import LOST, Backend, Capacity
from services.dispatch.dispatcher import Dispatcher
from tests.support.scripted_drivers import Driver, Script, dies, ends, obedient, succeeds
from tests.support.storages import save
from tests.support.tiny_jobs import job, make_data, model


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_policy, "BACK_OFF_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(queue, "CAPACITY_SECONDS", 0.0)
    monkeypatch.setenv("GENMODELS_GROW_SECONDS", "0")
    monkeypatch.setattr("genmodels.storage.retry.MAX_WAIT_SECONDS", 0.001)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


class Cluster(Backend):
    """Act as a backend that outlives dispatchers. Attempt n of a model follows script n; the last script repeats."""

    def __init__(self, storage: Storage, cpus: int = 4, **scripts: list[Script]) -> None:
        self.storage, self.cpus, self.scripts = storage, cpus, scripts
        self.drivers: dict[tuple[str, str, int], Driver] = {}
        self.sizes: list[tuple[str, int]] = []
        self.answers = True

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        key = (job, model, attempt)
        if key not in self.drivers:  # a used submission id
            scripts = self.scripts.get(model, [succeeds])
            script = scripts[min(attempt, len(scripts)) - 1]
            self.drivers[key] = Driver(script(Run(self.storage, job, model), attempt))
            self.sizes.append((model, workers))
        return self.drivers[key]

    def find(self, job: str, model: str, attempt: int) -> Driver:
        lost = Driver(iter(()))
        lost.code = LOST
        return self.drivers.get((job, model, attempt), lost)

    def capacity(self) -> Capacity | None:
        return Capacity(self.cpus, 0) if self.answers else None

    def started(self) -> list[str]:
        return [model for _, model, _ in self.drivers]


def spec(data: Path, name: str, *names: str, priority: int = 0, workers: Any = 1) -> JobSpec:
    entries = [model(data, "minigpt", each) | {"scaling": {"num_workers": workers}} for each in names]
    return job(name, *entries).model_copy(update={"priority": priority})


def submit(storage: Storage, *args: Any, **options: Any) -> str:
    return Jobs(storage).submit(spec(*args, **options))[0]


def play(dispatcher: Dispatcher, lease_term: int, *jobs: str, rounds: int = 100) -> None:
    """Tick until all these jobs have ended and are no longer in the queue."""
    for _ in range(rounds):
        dispatcher.dispatch_once(lease_term)
        if not set(jobs) & set(dispatcher.jobs.open()):
            return
    pytest.fail(f"still open: {dispatcher.jobs.open()}")


def state(storage: Storage, job: str, model: str) -> Status:
    return Run(storage, job, model).status()[0]


def check_history(status: Status) -> None:
    """Check that each state may follow the one before, and has a time and a reason."""
    follows = {
        "queued": {"starting", "cancelled"},
        "starting": {"running", "publishing", "queued", "failed", "cancelled", "succeeded"},
        "running": {"publishing", "queued", "failed", "cancelled", "succeeded"},
        "publishing": {"succeeded", "queued", "failed", "cancelled"},
        "succeeded": set(),
        "failed": {"queued"},
        "cancelled": {"queued"},
    }
    states = [change.state for change in status.history]
    assert states[0] == "queued"
    for before, after in pairwise(states):
        assert after in follows[before], states
    assert all(change.time and change.reason for change in status.history)
    assert [change.time for change in status.history] == sorted(change.time for change in status.history)


def far_from_done(run: Run, attempt: int) -> Iterator[object]:
    """Train until a command to stop comes, long before the end; then save."""
    parent = (run.checkpoints() or [None])[-1]
    run.start_attempt(attempt, parent, 1)
    step = (parent.step if parent else 0) + 10
    run.write_heartbeat(attempt, Heartbeat(phase="training", step=step, seconds_left=1000.0))
    while not run.commands(attempt):
        yield
    save(run, attempt, step, parent)
    run.write_result(attempt, Result(outcome="stopped", step=step))


def is_killed(run: Run, attempt: int) -> Iterator[object]:
    parent = (run.checkpoints() or [None])[-1]
    run.start_attempt(attempt, parent, 1)
    run.write_heartbeat(attempt, Heartbeat(phase="training", step=25, seconds_left=1000.0))
    yield
    run.write_result(attempt, Result(outcome="failed", cause="infrastructure", message="a worker was lost"))


def send_command(storage: Storage, job: str, model: str, kind: Any, then: Any) -> None:
    """Send a command as the job service does."""
    run, jobs = Run(storage, job, model), Jobs(storage)
    if kind == "resume":
        jobs.reopen(job)
    run.send_command(kind, run.status()[0].attempt, f"{kind} by key 1234", then)
    notify(jobs.storage, job, model)


def eventful(storage: Storage, data: Path) -> tuple[Cluster, list[str]]:
    """Submit two jobs with many events: a loss, a failure, a cancel, a preemption."""
    cluster = Cluster(storage, cpus=1, low=[obedient, dies, succeeds], bad=[ends("failed", "user", "wrong")])
    names = [submit(storage, data, "low", "low", "bad"), submit(storage, data, "stop", "stop")]
    return cluster, names


def carry_on(dispatcher: Dispatcher, lease_term: int, names: list[str], late: list[str], data: Path) -> None:
    """Tick to the end; on the way cancel one job, and submit one of higher priority."""
    storage: Any = dispatcher.storage
    people = getattr(storage, "inner", storage)
    for _ in range(100):
        dispatcher.dispatch_once(lease_term)
        if not late and state(people, names[0], "low").state == "running":
            send_command(people, names[1], "stop", "stop", "cancelled")
            late.append(submit(people, data, "dear", "dear", priority=3))
        if late and not Jobs(people).open():
            return
    pytest.fail("still open")


def check_the_end(storage: Storage, cluster: Cluster, names: list[str]) -> None:
    low, stop, dear = names
    statuses = {
        model: state(storage, name, model)
        for name, model in ((low, "low"), (low, "bad"), (stop, "stop"), (dear, "dear"))
    }
    assert {model: status.state for model, status in statuses.items()} == {
        "low": "succeeded",
        "bad": "failed",
        "stop": "cancelled",
        "dear": "succeeded",
    }
    for status in statuses.values():
        check_history(status)
    assert [change.state for change in statuses["dear"].history].count("succeeded") == 1
    assert {entry.job for _, entry in Jobs(storage).ended()} == set(names)
    assert len(Jobs(storage).ended()) == 3
    chain = Run(storage, low, "low").chain()
    assert all(link.parent is None or link.parent.attempt < link.attempt for link in chain)
