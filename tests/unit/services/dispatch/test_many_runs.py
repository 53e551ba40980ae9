"""Test the storage operations of the dispatcher and of the job metrics, with many open jobs of many models."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest
import yaml

from genmodels.errors import StorageUnavailable
from genmodels.runs.jobs import Jobs
from genmodels.runs.queue import notifications, notify
from genmodels.runs.records import Heartbeat, Result, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage
from services.dispatch.attempt import AttemptMonitor
from services.dispatch.backends.base import Capacity, Driver
from services.dispatch.dispatcher import MAX_READERS, POLL_SECONDS, READS_A_SECOND, Dispatcher
from services.jobs import metrics as jobmetrics
from services.jobs.metrics import JobMetrics
from services.jobs.views import Views
from tests.support.counting_storage import CountingStorage
from tests.support.job_service import Service, spec

JOBS, MODELS = 12, 20


class Full:
    """A cluster without room."""

    def start(self, *_: Any) -> Any:
        raise AssertionError

    find = start

    def capacity(self) -> Capacity:
        return Capacity(0, 0)


def submit(storage: Storage, jobs: int = JOBS, models: int = MODELS) -> None:
    document = spec("many", *(f"m{i}" for i in range(models)))
    parsed = parse_spec(yaml.safe_dump(document).encode(), "spec", paths=False)
    for _ in range(jobs):
        Jobs(storage).submit(parsed)


def test_the_first_tick_asks_a_few_things_of_each_run_many_at_once() -> None:
    storage = CountingStorage()
    submit(storage)
    storage.forget()
    storage.slow = 0.0005
    dispatcher = Dispatcher(storage, Full())
    dispatcher.dispatch_once(1)
    runs = JOBS * MODELS
    of_runs = {what: count for what, count in storage.counts.items() if what.endswith(" runs")}
    assert of_runs == {"get runs": runs, "put runs": runs}
    assert sum(storage.counts.values()) <= 2 * runs + 3 * JOBS + 10
    assert 2 <= storage.most <= MAX_READERS
    storage.forget()
    dispatcher.dispatch_once(1)
    assert sum(storage.counts.values()) <= 3  # the open jobs, the inbox: nothing of each run


class Busy:
    """A cluster whose drivers all run, until their names are in `ended`."""

    def __init__(self) -> None:
        self.ended: set[str] = set()

    def find(self, job: str, model: str, attempt: int) -> Any:
        return Running(self, f"{job}/{model}")

    def capacity(self) -> Capacity:
        return Capacity(10**6, 0)


class Running(Driver):
    def __init__(self, cluster: Busy, name: str) -> None:
        self.cluster, self.name = cluster, name

    def poll(self) -> int | None:
        return 0 if self.name in self.cluster.ended else None

    def kill(self) -> None:
        raise AssertionError


def train(storage: Storage) -> list[Run]:
    """Have all submitted runs train their first attempt."""
    runs = [Run(storage, job, f"m{i}") for job in Jobs(storage).open() for i in range(MODELS)]
    for run in runs:
        starting = Status(state="queued").to("queued", "submitted").to("starting", "attempt 1", attempt=1, workers=1)
        run.write_status(starting.to("running", "the workers train"), None)
        run.write_heartbeat(1, Heartbeat(phase="training", step=1, max_steps=9))
    return runs


@pytest.mark.parametrize("jobs", [1, 10])
def test_a_take_over_of_running_runs_costs_two_operations_each_many_at_once(jobs: int) -> None:
    storage = CountingStorage()
    submit(storage, jobs)
    runs = train(storage)
    storage.forget()
    storage.slow = 0.0005
    dispatcher = Dispatcher(storage, Busy())
    dispatcher.dispatch_once(1)
    of_runs = {what: count for what, count in storage.counts.items() if what.endswith(" runs")}
    assert of_runs.keys() == {"get runs", "put runs"}
    assert of_runs["put runs"] == len(runs), "the stamps"
    assert of_runs["get runs"] <= len(runs) + READS_A_SECOND, "the statuses, and no more heartbeats than in any round"
    assert 2 <= storage.most <= MAX_READERS


@pytest.mark.parametrize("jobs", [1, 10])
def test_heartbeats_of_runs_that_simply_train_cost_a_bounded_number_of_reads(
    jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, cluster = CountingStorage(), Busy()
    submit(storage, jobs)
    runs = train(storage)
    dispatcher = Dispatcher(storage, cluster)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    dispatcher.dispatch_once(1)
    storage.forget()
    for _ in range(60):
        clock += POLL_SECONDS
        dispatcher.dispatch_once(1)
    most = 60 * min(len(runs), READS_A_SECOND)
    assert 0.9 * most <= storage.counts["get runs"] <= most
    others = sum(count for what, count in storage.counts.items() if what != "get runs")
    assert others <= 60 * 3, "the open jobs, the inbox, now and then the queue"
    runs[3].write_result(1, Result(outcome="succeeded", message="published"))
    cluster.ended.add(runs[3].name)
    dispatcher.dispatch_once(1)
    assert runs[3].status()[0].state == "succeeded", "an end is seen at once"


def test_after_a_long_round_the_next_one_reads_no_more_than_others_and_each_run_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = CountingStorage()
    submit(storage, 25)
    runs = train(storage)
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    dispatcher = Dispatcher(storage, Busy())
    dispatcher.dispatch_once(1)
    clock += 60  # all are due
    read: list[str] = []
    storage.before = lambda verb, key: read.append(key) if key.endswith("heartbeat.json") else None
    for _ in range(len(runs) // READS_A_SECOND):
        before = len(read)
        dispatcher.dispatch_once(1)
        assert len(read) - before == READS_A_SECOND
    assert len(set(read)) == len(runs) == 500
    stopping = runs[0]
    stopping.send_command("stop", 1, "by a test")
    notify(storage, stopping.job, stopping.model)
    clock += 60
    for _ in range(3):
        read.clear()
        dispatcher.dispatch_once(1)
        assert len(read) <= READS_A_SECOND + 1
    assert any(stopping.name in key for key in read), "a run that stops is read in each round"


def test_a_run_that_is_read_rarely_hangs_no_longer_than_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monitor, heartbeat = AttemptMonitor(Running(Busy(), "j/m")), Heartbeat(phase="training", step=1)
    monitor.observe(heartbeat)
    for _ in range(4):
        clock += 30
        silence = monitor.observe(heartbeat, rest=30)
    assert silence == pytest.approx(120)
    clock += 1000
    assert monitor.observe(heartbeat, rest=30) < 160, "of an outage little counts"


def test_a_store_that_is_away_is_not_asked_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.dispatch.dispatcher.READS_A_SECOND", 10**6)
    storage = CountingStorage()
    submit(storage, 10)
    train(storage)
    dispatcher = Dispatcher(storage, Busy())
    dispatcher.dispatch_once(1)
    storage.forget()

    def away(verb: str, key: str) -> None:
        if key.endswith("heartbeat.json"):
            raise StorageUnavailable(key)

    storage.before = away
    dispatcher.dispatch_once(1)
    assert 0 < storage.counts["get runs"] <= MAX_READERS + 1


def test_a_command_that_a_dispatcher_did_not_apply_is_applied_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = CountingStorage()
    service = Service(storage)
    job = service.submit("a", "b")
    old = Dispatcher(storage, Full())
    old.dispatch_once(1)
    assert service("POST", f"/v1/jobs/{job}/cancel", {"models": ["b"]}).status_code == 200
    monkeypatch.setattr(old, "_step", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        old.dispatch_once(1)
    Dispatcher(storage, Full()).dispatch_once(2)
    assert [run["state"] for run in service.show(job)["models"]] == ["queued", "cancelled"]
    assert notifications(service.jobs.storage) == []


def figures(text: bytes) -> dict[str, float]:
    samples = re.findall(rb"^(genmodels_(?:open_runs|queue_length|queue_oldest|job|storage_up)\S*) (\S+)$", text, re.M)
    return {name.decode(): float(value) for name, value in samples}


def test_figures_cost_one_object_of_each_run() -> None:
    storage = CountingStorage()
    submit(storage)
    metrics = JobMetrics(Views(storage))
    storage.forget()
    first = until(metrics, 'genmodels_open_runs{state="queued"}')
    assert first['genmodels_open_runs{state="queued"}'] == JOBS * MODELS
    assert sum(storage.counts.values()) <= JOBS * MODELS + 3 * JOBS + 3
    for _ in range(20):
        metrics.text()
    assert storage.counts["get runs"] == JOBS * MODELS  # cached for a while


def test_a_scrape_does_not_wait_for_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape returns the last known values and their age; many scrapes cost one read."""
    monkeypatch.setattr(jobmetrics, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(jobmetrics, "CACHE_TTL_SECONDS", 0.0)
    storage = CountingStorage()
    metrics = JobMetrics(Views(storage))
    storage.held.clear()
    assert figures(metrics.text()) == {}  # nothing is known yet
    storage.held.set()
    first = until(metrics, 'genmodels_open_runs{state="queued"}')
    assert first["genmodels_storage_up"] == 1.0
    storage.held.clear()
    submitting = threading.Thread(target=submit, args=(storage, 1, 1))
    submitting.start()
    ages = []
    deadline = time.monotonic() + 20
    while len(ages) < 3 and time.monotonic() < deadline:
        scraped = figures(metrics.text())
        assert scraped['genmodels_open_runs{state="queued"}'] == 0.0
        if not ages or scraped["genmodels_job_metrics_age_seconds"] > ages[-1]:
            ages.append(scraped["genmodels_job_metrics_age_seconds"])
    assert len(ages) == 3
    storage.held.set()
    submitting.join()
    deadline = time.monotonic() + 20
    while figures(metrics.text())['genmodels_open_runs{state="queued"}'] != 1.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until(metrics: JobMetrics, name: str) -> dict[str, float]:
    deadline = time.monotonic() + 20
    while name not in (scraped := figures(metrics.text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return scraped
