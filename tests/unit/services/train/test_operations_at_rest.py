"""Test what a run costs in storage operations while it trains quietly, whatever its world size."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genmodels.runs.control import LOOKS_A_SECOND
from genmodels.runs.records import Heartbeat
from genmodels.runs.store import Run
from genmodels.training.attempt import _watcher
from genmodels.training.group import Group
from genmodels.training.recorder import RunRecorder
from services.train.control import DriverWatch
from tests.support.counting_storage import CountingStorage
from tests.support.published_models import build
from tests.support.storages import LINEAGE
from tests.support.tiny_jobs import job, model

BEGINNING, REST = 600, 1200  # seconds: before the rest, and of it


class Clock:
    """The time, and the `closing` event of a thread: to wait takes no time, and each wait is followed by `work`."""

    def __init__(self, storage: CountingStorage, work: Callable[[], None] = lambda: None) -> None:
        self.storage, self.work, self.now = storage, work, 0.0

    def wait(self, seconds: float) -> bool:
        if self.now < BEGINNING <= self.now + seconds:
            self.storage.forget()
        self.now += seconds
        self.work()
        return self.is_set()

    def is_set(self) -> bool:
        return self.now >= BEGINNING + REST


@pytest.fixture
def storage() -> CountingStorage:
    return CountingStorage()


@pytest.fixture
def run(storage: CountingStorage) -> Run:
    run = Run(storage, "job", "vae")
    run.start_attempt(1, None, 1)
    return run


@pytest.fixture(autouse=True)
def at_rest(storage: CountingStorage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the loop of a background thread; return the operations that it makes at rest."""
    clock = Clock(storage)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def at_rest(owner: Any, loop: Callable[[], None], work: Callable[[], None] = lambda: None) -> int:
        nonlocal clock
        owner.closing = clock = Clock(storage, work)
        loop()
        return sum(storage.counts.values())

    return at_rest


@pytest.mark.parametrize("world_size", [1, 2, 64])
def test_a_run_at_rest_costs_one_operation_a_second_whatever_its_world_size(
    run: Run, at_rest: Callable[..., int], world_size: int
) -> None:
    """Every step logs a row of metrics, each rank looks for commands, and so does the driver."""
    spec = job("tiny", model(Path("/data"), "vae", max_steps=10**6)).models[0]
    family, _ = build("vae", density_components=1)
    recorder = RunRecorder(run, 1, spec, family, {}, lambda: (), LINEAGE)

    def step() -> None:
        recorder.report_progress("training", recorder.heartbeat.step + 1, 1.0)
        recorder.log({"step": recorder.heartbeat.step, "loss": 1.0})

    driver = DriverWatch(run, 1, None)
    driver.training(max_steps=10**6)
    run.write_heartbeat(1, Heartbeat(phase="training", step=1, progress_count=1))
    groups = [Group(rank, world_size) for rank in range(world_size)]
    ranks = [(_watcher(run, 1, group, None), group._note_exchange) for group in groups]
    operations = at_rest(driver, driver._watch) + at_rest(recorder, recorder._write_heartbeats, step)
    operations += sum(at_rest(rank, rank._watch, exchange) for rank, exchange in ranks)
    assert operations <= REST
    assert run.heartbeat(1).step > BEGINNING, "it trained"


@pytest.mark.parametrize("world_size", [2, 64])
def test_ranks_that_stand_still_look_at_a_bounded_rate(run: Run, at_rest: Callable[..., int], world_size: int) -> None:
    """Each rank is asked alone, so the operations of one are to be multiplied."""
    group = Group(1, world_size)
    for _ in range(2):
        group._note_exchange()
    watch = _watcher(run, 1, group, None)
    assert 0 < at_rest(watch, watch._watch) * world_size <= LOOKS_A_SECOND * REST


def test_another_rank_reads_a_kill_only_while_training_stands_still(
    run: Run, storage: CountingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    group = Group(1, 2)
    watch = _watcher(run, 1, group, None)
    reasons: list[str] = []
    monkeypatch.setattr(watch, "_kill", reasons.append)
    for _ in range(2):  # two exchanges in 4 s: this is what a step takes
        now += 4
        group._note_exchange()
    run.send_command("kill", 1, "no progress for 120 s")
    storage.forget()
    now += 8
    assert not watch.look()
    assert not storage.counts
    now += 1.5
    assert watch.look()
    assert reasons == ["no progress for 120 s"]


def test_rank_0_reads_a_command_within_two_seconds_and_lists_none_before(
    run: Run, storage: CountingStorage, at_rest: Callable[..., int]
) -> None:
    watch = _watcher(run, 1, Group(), None)
    at_rest(watch, watch._watch)
    assert set(storage.counts) == {"exists runs"}
    assert REST / 2 <= storage.counts["exists runs"] <= REST / 2 + 1, "a look each 2 s"
    run.send_command("stop", 2, "of another attempt")
    run.send_command("stop", 1, "preempted")
    assert watch.look()
    assert watch.should_stop.is_set()
    assert not watch.look()


@pytest.mark.parametrize("attempts_before", [1, 3])
def test_the_first_look_reads_past_the_commands_of_earlier_attempts(run: Run, attempts_before: int) -> None:
    for attempt in range(1, attempts_before + 1):
        run.send_command("stop", attempt, "preempted")
    watch = _watcher(run, attempts_before + 1, Group(), None)
    watch.look()
    assert not watch.should_stop.is_set()
    run.send_command("stop", attempts_before + 1, "preempted")
    watch.look()
    assert watch.should_stop.is_set()


def test_a_new_phase_is_told_at_once_also_late(run: Run, at_rest: Callable[..., int]) -> None:
    spec = job("tiny", model(Path("/data"), "vae", max_steps=10**6)).models[0]
    family, _ = build("vae", density_components=1)
    recorder = RunRecorder(run, 1, spec, family, {}, lambda: (), LINEAGE)
    phases: list[tuple[float, str]] = []

    def work() -> None:
        now = time.monotonic()
        recorder.report_progress("saving" if now == BEGINNING else "training", int(now))
        phases.append((now, run.heartbeat(1).phase if now > 2 else ""))

    at_rest(recorder, recorder._write_heartbeats, work)
    assert [now for now, phase in phases if phase == "saving"] == [BEGINNING + 1]
