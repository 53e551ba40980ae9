"""Test that damaged objects, restarts and rare moments neither stop the queue nor leave a run in a wrong state."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from genmodels.errors import GenmodelsError, LeaseLost
from genmodels.runs.queue import QUEUE, notifications, notify
from genmodels.runs.records import Heartbeat, Result
from genmodels.runs.store import Run
from services.dispatch import single_run
from services.dispatch.attempt import AttemptMonitor
from services.dispatch.backends.ray_jobs import RayJobsBackend
from services.dispatch.dispatcher import Dispatcher
from services.dispatch.single_run import run_to_completion
from services.http.auth import Caller
from services.jobs.operations import JobOperations
from services.jobs.schemas import CancelBody, ResumeBody
from services.local import platform
from tests.support.scripted_cluster import Cluster, data, in_no_time, play, spec, state, submit
from tests.support.scripted_drivers import Script, ends, obedient, succeeds
from tests.support.storages import FailingStorage, MemoryStorage, Wrapped, save

__all__ = ["data", "in_no_time"]


def cancel(storage: Any, job: str, now: bool = False) -> None:
    JobOperations(storage).cancel(job, CancelBody(now=now), Caller())


class Clock:
    """A clock that advances only when a test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def run(self, dispatcher: Dispatcher, seconds: int, lease_term: int = 1) -> None:
        for _ in range(seconds):
            dispatcher.dispatch_once(lease_term)
            self.now += 1


# ---- one object


def test_a_job_of_genmodels_run_is_not_the_services(data: Path) -> None:
    storage = MemoryStorage()
    mine = platform.submit(storage, spec(data, "mine", "a"))
    other = submit(storage, data, "other", "b")
    with pytest.raises(GenmodelsError, match="no job"):
        cancel(storage, mine)
    assert storage.list(f"runs/{mine}/") == []
    notify(storage, mine, "a")
    play(Dispatcher(storage, Cluster(storage)), 1, other)
    assert (state(storage, other, "b").state, notifications(storage)) == ("succeeded", [])


def test_a_damaged_index_stops_no_other_job(data: Path) -> None:
    storage = MemoryStorage()
    damaged = submit(storage, data, "damaged", "a")
    storage.put(f"jobs/{damaged}/index.json", b"{broken")
    dispatcher = Dispatcher(storage, Cluster(storage))
    for _ in range(10):
        dispatcher.dispatch_once(1)
    other = submit(storage, data, "other", "b")
    play(dispatcher, 1, other)
    assert (state(storage, damaged, "a").state, state(storage, other, "b").state) == ("succeeded", "succeeded")


@pytest.mark.parametrize("name", ["jobs/{}/spec.json", "runs/{}/a/attempt-1/heartbeat.json"])
def test_one_object_that_the_store_cannot_give_stops_no_other_job(data: Path, name: str) -> None:
    inner = MemoryStorage()
    one = submit(inner, data, "one", "a")
    storage = FailingStorage(inner, only=name.format(one))
    dispatcher = Dispatcher(storage, Cluster(storage, a=[obedient]))
    if "runs" in name:
        dispatcher.dispatch_once(1)
    storage.away = True
    other = submit(inner, data, "other", "b")
    for _ in range(50):
        dispatcher.dispatch_once(1)
    assert state(inner, other, "b").state == "succeeded"


def test_a_command_of_another_release_is_passed_over(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, a=[obedient])
    name = submit(storage, data, "one", "a")
    dispatcher = Dispatcher(storage, cluster)
    dispatcher.dispatch_once(1)
    run = Run(storage, name, "a")
    document = run.send_command("stop", 1, "x").model_dump(mode="json")
    storage.put(f"{run.prefix}/commands/00000001.json", json.dumps({**document, "action": "resize"}).encode())
    cancel(storage, name)
    play(dispatcher, 1, name)
    assert state(storage, name, "a").state == "cancelled"


@pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(200, json={"data": 7})])
def test_what_is_not_rays_answer_is_none(answer: httpx.Response) -> None:
    backend = RayJobsBackend("http://127.0.0.1:1")
    backend.dashboard.ask = lambda *_, **__: answer
    assert backend.capacity() is None


# ---- odd moments


def keeps_training(run: Run, attempt: int) -> Iterator[object]:
    run.start_attempt(attempt, None, 1)
    count = 0
    while True:
        count += 1
        run.write_heartbeat(attempt, Heartbeat(phase="training", step=count, progress_count=count))
        yield


def is_never_started(run: Run, attempt: int) -> Iterator[object]:
    while True:
        yield


@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("script", [keeps_training, is_never_started])
def test_a_restart_remembers_that_an_attempt_is_to_end(
    data: Path, monkeypatch: pytest.MonkeyPatch, now: bool, script: Script
) -> None:
    storage = MemoryStorage()
    clock, cluster = Clock(monkeypatch), Cluster(storage, a=[script])
    name = submit(storage, data, "one", "a")
    first = Dispatcher(storage, cluster)
    clock.run(first, 3)
    cancel(storage, name, now)
    with pytest.MonkeyPatch.context() as patch:  # killed right after it has read the command
        patch.setattr(AttemptMonitor, "kill_if_overdue", lambda *_: None)
        clock.run(first, 1)
    clock.run(Dispatcher(storage, cluster), 200, lease_term=2)
    assert state(storage, name, "a").state == "cancelled"


def test_a_cancel_right_after_a_resume_counts(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, a=[ends("failed", "user", "x"), succeeds])
    name = submit(storage, data, "one", "a")
    dispatcher = Dispatcher(storage, cluster)
    play(dispatcher, 1, name)
    JobOperations(storage).resume(name, ResumeBody(), Caller())
    cancel(storage, name)
    play(dispatcher, 1, name)
    assert (state(storage, name, "a").state, len(cluster.drivers)) == ("cancelled", 1)


def evaluates_often(run: Run, attempt: int) -> Iterator[object]:
    parent = (run.checkpoints() or [None])[-1]
    run.start_attempt(attempt, parent, 1)
    step = 0
    while not run.commands(attempt):
        step += 1
        phase: Any = "training" if step % 3 else "evaluating"
        run.write_heartbeat(attempt, Heartbeat(phase=phase, step=step, progress_count=step, seconds_left=10_000.0))
        yield
    save(run, attempt, step, parent)
    run.write_result(attempt, Result(outcome="stopped", step=step))


def test_a_run_that_evaluates_often_grows_too(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    clock, cluster = Clock(monkeypatch), Cluster(storage, cpus=1, a=[evaluates_often])
    monkeypatch.setenv("GENMODELS_GROW_SECONDS", "15")
    submit(storage, data, "one", "a", workers={"min": 1, "max": 2})
    dispatcher = Dispatcher(storage, cluster)
    clock.run(dispatcher, 5)
    cluster.cpus = 2
    clock.run(dispatcher, 40)
    assert cluster.sizes == [("a", 1), ("a", 2)]


def test_who_wakes_late_takes_no_newer_notification(data: Path) -> None:
    inner = MemoryStorage()
    cluster = Cluster(inner, cpus=0)
    name = submit(inner, data, "one", "a")
    new = Dispatcher(inner, cluster)

    class Paused(Wrapped):
        armed = False

        def before(self, verb: str, key: str) -> None:
            if self.armed and verb == "delete" and "notifications" in key:
                self.armed = False
                new.dispatch_once(2)
                cancel(inner, name)

    storage = Paused(inner)
    old = Dispatcher(storage, cluster)
    old.dispatch_once(1)
    notify(inner, name, "a")
    storage.armed = True
    old.dispatch_once(1)
    assert len(notifications(inner)) == 1, "that of the command"
    with pytest.raises(LeaseLost):
        old.dispatch_once(1)
    play(new, 2, name)
    assert state(inner, name, "a").state == "cancelled"


def test_the_queue_is_in_order_also_while_the_cluster_is_silent(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage)
    cluster.answers = False
    low, high = submit(storage, data, "a-low", "a"), submit(storage, data, "z-high", "b", priority=9)
    Dispatcher(storage, cluster).dispatch_once(1)
    assert [run["job"] for run in json.loads(storage.get(QUEUE)[0])["queue"]] == [high, low]


def test_genmodels_run_killed_again_and_again_is_tried_when_it_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(single_run, "POLL_SECONDS", 0.0)
    storage = MemoryStorage()
    run = Run(storage, "job-00000000", "model")

    class Killed(BaseException):
        pass

    def dies_with_all(run: Run, attempt: int) -> Iterator[object]:
        run.start_attempt(attempt, None, 1)
        yield
        raise Killed

    for _ in range(4):
        monkeypatch.setattr(single_run, "interrupt", lambda *_: None)
        with pytest.raises(Killed):
            run_to_completion(
                storage, Cluster(storage, model=[dies_with_all] * 9), run.job, run.model, 1, lambda *_: None
            )
    status, _ = run_to_completion(storage, Cluster(storage, model=[succeeds]), run.job, run.model, 1, lambda *_: None)
    assert (status.state, status.attempt) == ("succeeded", 5)
