"""Test the queue from submission to the end of every run: restarts at any point, two dispatchers, users' commands."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import LeaseLost, StorageUnavailable
from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import QUEUE, notifications, notify
from genmodels.runs.records import ENDED
from genmodels.runs.store import Run
from genmodels.storage import Storage
from genmodels.storage.lease import Lease
from services.dispatch.dispatcher import Dispatcher
from tests.support.scripted_cluster import (
    Cluster,
    carry_on,
    check_history,
    check_the_end,
    data,
    eventful,
    far_from_done,
    in_no_time,
    is_killed,
    play,
    send_command,
    spec,
    state,
    submit,
)
from tests.support.scripted_drivers import dies, ends, obedient, succeeds
from tests.support.storages import MemoryStorage, RecordingStorage, Wrapped

__all__ = ["data", "in_no_time"]


# ---- the queue


def test_jobs_of_different_priorities_run_in_order_and_end(storage: Storage, data: Path) -> None:
    cluster = Cluster(storage, cpus=1)
    first = submit(storage, data, "first", "a", "b")
    dear = submit(storage, data, "dear", "c", priority=5)
    last = submit(storage, data, "last", "d")
    play(Dispatcher(storage, cluster), 1, first, dear, last)
    assert cluster.started() == ["c", "a", "b", "d"]
    for name, models in ((first, "ab"), (dear, "c"), (last, "d")):
        for each in models:
            status = state(storage, name, each)
            assert (status.state, status.attempt, status.workers, status.lease_term) == ("succeeded", 1, 1, 1)
            check_history(status)
    ended = {entry.job: entry.states for _, entry in Jobs(storage).ended()}
    assert ended == {
        first: {"a": "succeeded", "b": "succeeded"},
        dear: {"c": "succeeded"},
        last: {"d": "succeeded"},
    }


def test_a_model_that_fails_does_not_affect_others(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, bad=[ends("failed", "user", "ValueError: shapes differ")], lost=[dies, succeeds])
    name = submit(storage, data, "mixed", "bad", "good", "lost")
    play(Dispatcher(storage, cluster), 1, name)
    ends_of_runs = {
        each: (state(storage, name, each).state, state(storage, name, each).attempt) for each in ("bad", "good", "lost")
    }
    assert ends_of_runs == {"bad": ("failed", 1), "good": ("succeeded", 1), "lost": ("succeeded", 2)}
    assert state(storage, name, "bad").reason == "ValueError: shapes differ"


def test_why_runs_wait_is_there_for_whoever_asks(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, cpus=2, a=[obedient])
    name = submit(storage, data, "full", "a", "b", "huge", workers=2)
    huge = submit(storage, data, "huge", "h", workers=12)
    dispatcher = Dispatcher(storage, cluster)
    for _ in range(3):
        dispatcher.dispatch_once(1)
    shown = json.loads(storage.get(QUEUE)[0])
    assert shown["capacity"] == {"cpus": 2, "gpus": 0}
    assert shown["queue"] == [
        {"job": name, "model": "b", "reason": "needs 2 CPUs, free: 0 CPUs"},
        {"job": name, "model": "huge", "reason": "needs 2 CPUs, free: 0 CPUs"},
        {"job": huge, "model": "h", "reason": "needs 12 CPUs; the cluster has 2 CPUs"},
    ]
    cluster.answers = False
    dispatcher.dispatch_once(1)
    shown = json.loads(storage.get(QUEUE)[0])
    assert shown["capacity"] is None
    assert {waiting["reason"] for waiting in shown["queue"]} == {"the cluster does not answer"}
    written = len(storage.objects[QUEUE])
    dispatcher.dispatch_once(1)
    assert len(storage.objects[QUEUE]) == written


def test_a_higher_priority_preempts_and_the_lower_goes_on_after_it(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, cpus=1, low=[obedient, succeeds])
    low = submit(storage, data, "low", "low")
    dispatcher = Dispatcher(storage, cluster)
    while state(storage, low, "low").state != "running":
        dispatcher.dispatch_once(1)
    high = submit(storage, data, "high", "high", priority=1)
    play(dispatcher, 1, low, high)
    status = state(storage, low, "low")
    reasons = [change.reason for change in status.history]
    assert "preempted by a run of priority 1; continues from step 8" in reasons
    assert (status.state, status.attempt, status.no_progress_attempts) == ("succeeded", 2, 0)
    assert Run(storage, low, "low").chain()[-1].parent is not None
    assert state(storage, high, "high").history[-1].time < status.history[-1].time


def test_an_elastic_run_starts_with_what_is_there_grows_and_shrinks(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, cpus=1, a=[far_from_done, is_killed, succeeds])
    name = submit(storage, data, "elastic", "a", workers={"min": 1, "max": 3})
    dispatcher = Dispatcher(storage, cluster)
    for _ in range(5):
        dispatcher.dispatch_once(1)
    cluster.cpus = 3
    while len(cluster.sizes) < 2:
        dispatcher.dispatch_once(1)
    cluster.cpus = 2
    play(dispatcher, 1, name)
    assert cluster.sizes == [("a", 1), ("a", 3), ("a", 2)]
    reasons = [change.reason for change in state(storage, name, "a").history]
    assert "grows from 1 to 3 workers; continues from step 10" in reasons
    assert "attempt 3 with 2 workers" in reasons


def test_a_damaged_job_stands_in_no_others_way(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    names = [submit(storage, data, f"damaged-{i}", "a") for i in range(3)]
    storage.put(f"jobs/{names[0]}/spec.json", b"models: 7")
    storage.put(f"runs/{names[1]}/a/status.json", b'{"state": "no such state"}')
    storage.put(f"open/{names[2]}", b"spoiled")
    storage.put("open/orphan-00000000", b"{}")
    good = submit(storage, data, "good", "a")
    dispatcher = Dispatcher(storage, Cluster(storage))
    play(dispatcher, 1, good)
    assert state(storage, good, "a").state == "succeeded"
    assert all(sum(name in line for line in caplog.messages) == 1 for name in names)
    assert not any("orphan" in line for line in caplog.messages)


# ---- commands


def test_cancel_and_resume(storage: Storage, data: Path) -> None:
    cluster = Cluster(storage, cpus=1, a=[obedient, succeeds])
    name = submit(storage, data, "commanded", "a", "b")
    dispatcher = Dispatcher(storage, cluster)
    while state(storage, name, "a").state != "running":
        dispatcher.dispatch_once(1)
    send_command(storage, name, "a", "stop", "cancelled")
    send_command(storage, name, "b", "stop", "cancelled")
    play(dispatcher, 1, name)
    assert {each: state(storage, name, each).state for each in "ab"} == {"a": "cancelled", "b": "cancelled"}
    assert cluster.started() == ["a"]
    send_command(storage, name, "a", "resume", "queued")
    play(dispatcher, 1, name)
    status = state(storage, name, "a")
    assert (status.state, status.attempt, state(storage, name, "b").state) == ("succeeded", 2, "cancelled")
    check_history(status)
    assert len(Jobs(storage).ended()) == 1


def test_a_resume_is_not_lost_when_the_job_is_closed_again_before_the_command_is_there(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, a=[ends("failed", "user", "no such file"), succeeds])
    name = submit(storage, data, "quick", "a")
    dispatcher = Dispatcher(storage, cluster)
    play(dispatcher, 1, name)
    Jobs(storage).reopen(name)
    play(dispatcher, 1, name)  # there is no command yet: the job is closed again
    Run(storage, name, "a").send_command("resume", 1, "by key 1234", "queued")
    notify(storage, name, "a")
    dispatcher.dispatch_once(1)
    play(dispatcher, 1, name)
    assert state(storage, name, "a").state == "succeeded"
    assert len(Jobs(storage).ended()) == 1


def test_a_notification_for_nothing_does_no_harm(data: Path) -> None:
    storage = MemoryStorage()
    name = submit(storage, data, "calm", "a")
    notify(storage, "gone-00000000", "a")
    notify(storage, name, "no-such-model")
    dispatcher = Dispatcher(storage, Cluster(storage))
    play(dispatcher, 1, name)
    assert (state(storage, name, "a").state, notifications(storage)) == ("succeeded", [])


# ---- restarts


def test_a_restart_reads_open_jobs_only(data: Path) -> None:
    storage = RecordingStorage()
    jobs = Jobs(storage)
    one = spec(data, "old", "a")
    for i in range(30):
        name, _ = jobs.submit(one)
        jobs.close(name, f"2026-01-01T00:00:{i:02}.000+00:00", {"a": "succeeded"})
    name = submit(storage, data, "new", "a")
    touched: list[str] = []

    class Watched(Wrapped):
        def before(self, verb: str, key: str) -> None:
            touched.append(key)

    Dispatcher(Watched(storage), Cluster(storage)).dispatch_once(1)
    assert not [key for key in touched if "old-" in key or key.startswith("ended")]
    assert [key for key in touched if name in key]


class Killed(BaseException):
    """Stand in for a kill -9 of the process."""


class Deadly(Wrapped):
    """Kill the calling process before or after its n-th write."""

    def __init__(self, inner: Storage, at: int, when: str) -> None:
        super().__init__(inner)
        self.at, self.when, self.writes = at, when, 0

    def before(self, verb: str, key: str) -> None:
        if verb in ("put", "delete"):
            self.writes += 1
            if self.writes == self.at and self.when == "before":
                raise Killed

    def after(self, verb: str, key: str) -> None:
        if verb in ("put", "delete") and self.writes == self.at and self.when == "after":
            raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_kill_at_any_write_the_next_dispatcher_completes_all_runs(data: Path, when: str) -> None:
    at = 0
    while True:
        at += 1
        inner = MemoryStorage()
        cluster, names = eventful(inner, data)
        late: list[str] = []
        storage = Deadly(inner, at, when)
        try:
            carry_on(Dispatcher(storage, cluster), 1, names, late, data)
            break
        except Killed:
            carry_on(Dispatcher(inner, cluster), 2, names, late, data)
        check_the_end(inner, cluster, [*names, *late])
    assert at > 30


@pytest.mark.slow
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_the_store_is_away_at_every_point(data: Path, stride: int) -> None:
    class Blinking(Wrapped):
        operations, refused, at = 0, 0, 0

        def before(self, verb: str, key: str) -> None:
            self.operations += 1
            if self.operations >= self.at and self.refused < 5:
                self.refused += 1
                raise StorageUnavailable(key)

    at = 0
    while True:
        at += stride
        inner = MemoryStorage()
        cluster, names = eventful(inner, data)
        storage = Blinking(inner)
        storage.at = at
        late: list[str] = []
        carry_on(Dispatcher(storage, cluster), 1, names, late, data)
        if not storage.refused:
            break
        check_the_end(inner, cluster, [*names, *late])
    assert at > 100


# ---- two dispatchers


def test_one_that_was_paused_beyond_its_lease_changes_nothing(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, cpus=4, a=[obedient, succeeds])
    name = submit(storage, data, "contested", "a", "b")
    old, new = Dispatcher(storage, cluster), Dispatcher(storage, cluster)
    while state(storage, name, "a").state != "running":
        old.dispatch_once(1)
    new.dispatch_once(2)
    before = dict(storage.objects)
    run = old._runs[f"{name}/a"].supervisor
    with pytest.raises(LeaseLost):
        run.to("failed", "the old one wakes in the middle of a decision")
    with pytest.raises(LeaseLost):
        Dispatcher(storage, cluster).dispatch_once(1)
    assert storage.objects == before
    send_command(storage, name, "a", "stop", "cancelled")
    play(new, 2, name)
    assert state(storage, name, "a").state == "cancelled"
    assert len(cluster.drivers) == 2, "none was started twice"


@pytest.mark.slow
def test_the_second_takes_over_when_the_first_is_gone(data: Path) -> None:
    storage = MemoryStorage()
    cluster = Cluster(storage, a=[obedient, succeeds])
    name = submit(storage, data, "handed-on", "a")
    stops = [threading.Event(), threading.Event()]
    dispatchers = [Dispatcher(storage, cluster, Lease(storage, seconds=2.0)) for _ in stops]
    threads = [
        threading.Thread(target=dispatcher.run, args=(stop,), daemon=True)
        for dispatcher, stop in zip(dispatchers, stops, strict=True)
    ]
    threads[0].start()
    wait(lambda: state(storage, name, "a").state == "running")
    threads[1].start()
    stops[0].set()
    threads[0].join(10)
    wait(lambda: state(storage, name, "a").lease_term == 2)
    send_command(storage, name, "a", "stop", "cancelled")
    wait(lambda: state(storage, name, "a").state in ENDED)
    stops[1].set()
    threads[1].join(10)
    assert (state(storage, name, "a").state, len(cluster.drivers)) == ("cancelled", 1)


def wait(condition: Any, seconds: float = 20.0) -> None:
    waiting = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        waiting.wait(0.02)
    pytest.fail("it did not come about")
