"""Test that each job runs once, to its end, with the weights of an undisturbed run, whichever process dies."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from tests.support.platform_processes import CPUS, Stack, check_history, parents, tiny_model
from tests.support.ray_node import until

pytestmark = pytest.mark.timeout(900)  # on a busy machine a worker group may need half a minute to start

HANG_SECONDS = 10
OUTAGE_SECONDS = 8
LONG: dict[str, Any] = {"max_steps": 500, "save_every": 50}
SHORT: dict[str, Any] = {"max_steps": 500, "save_every": 25}
STORE_FAULTS = ("500", "503", "503 SlowDown", "reset", "slow", "drop-answer")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("stack"),
        GENMODELS_HANG_SECONDS=str(HANG_SECONDS),
        GENMODELS_GROW_SECONDS="2",
        GENMODELS_GROW_WORTH_SECONDS="1",
        RAY_health_check_period_ms="1000",  # a node is lost after five missed checks; 3000 by default
    ) as stack:
        yield stack


@pytest.fixture(autouse=True)
def own_faults_alone(stack: Stack) -> Iterator[None]:
    """Heal the proxy and cancel all jobs after each test, so that no test affects the next one."""
    yield
    stack.proxy.heal()
    stack.cancel_all()


def test_workers_killed_and_hung(stack: Stack) -> None:
    """Kill workers in a step, in an upload, and between a manifest and the action after it; then stop one."""
    run = stack.submit_one(tiny_model("worker", 2, **LONG))

    stack.saves(run, 1)
    when = stack.kill(stack.workers(run, 1)[0])
    stack.trains(run, 2, since=when, what="one of two workers killed in a step")
    first = took_over(stack, run, 2)
    assert first.attempt == 1

    stack.proxy.fail("hang", method="PUT", path=f"{run.name}/attempt-2/checkpoints/")
    until(lambda: stack.proxy.count("PUT", "hang"), "an upload hangs")
    when = stack.kill(*stack.workers(run, 2))
    stack.proxy.heal()
    stack.trains(run, 3, since=when, what="both workers killed in an upload")
    assert took_over(stack, run, 3) == first

    second = CheckpointRef(attempt=3, step=first.step + LONG["save_every"])
    manifest = f"{run.checkpoint_prefix(second)}/manifest.json"
    stack.proxy.fail("hang-answer", method="PUT", path=manifest)
    until(lambda: stack.storage.exists(manifest), "a manifest is stored")
    when = stack.kill(*stack.workers(run, 3))
    stack.proxy.heal()
    stack.trains(run, 4, since=when, what="both workers killed after a manifest")
    assert took_over(stack, run, 4) == second

    stopped, when = stack.workers(run, 4)[0], time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    stack.trains(run, 5, since=when, what=f"a rank hangs, which is found after {HANG_SECONDS} s")
    third = took_over(stack, run, 5)
    until(lambda: stopped not in stack.find(""), "the rank that was stopped is gone")
    lines = stack.service.text(f"/jobs/{run.job}/logs").splitlines()
    living = [line for line in lines if re.search(r" worker/[01] ", line)]
    assert any("Killed: no progress for" in line for line in living)
    assert any(line.endswith("Thread MainThread:") for line in living)
    assert any(re.search(r"in train \(.*genmodels/training/loop\.py:\d+\)$", line) for line in living)

    status = stack.reaches(run, "succeeded")
    stack.check_succeeded(run, attempts=5)
    assert parents(run) == [None, first, second] + [third] * (third != second)  # attempt 2 is no part of the history
    reasons = [change.reason for change in status.history if change.state == "queued"]
    assert [reason.split(" (")[0] for reason in reasons[1:4]] == ["a worker was lost"] * 3
    assert re.match(r"no progress for 1\d s in phase ", reasons[4])


def test_driver_job_service_and_the_whole_of_ray_killed(stack: Stack) -> None:
    """Kill them while a run trains and another one waits for its workers."""
    active = stack.submit_one(tiny_model("active", CPUS, **LONG))
    slow = stack.proxy.fail("slow", method="PUT", path=f"{active.name}/attempt-")  # so that it does not end yet
    waiting = stack.submit_one(tiny_model("waiting", **SHORT))
    stack.saves(active, 1)
    shown = stack.shown(waiting)
    assert (shown["state"], shown["position"], shown["wait"]) == ("queued", 1, "needs 1 CPU, free: 0 CPUs")

    when = stack.kill(*stack.drivers(active, 1))
    stack.trains(active, 2, since=when, what="driver killed")
    first = took_over(stack, active, 2)

    lease_term, runs = active.status()[0].lease_term, (active, waiting)
    stack.service.kill()
    before = stack.saves(active, 2)
    until(lambda: stack.saves(active, 2).step > before.step, "the run goes on without a job service")
    stack.proxy.heal(slow)
    stack.proxy.fail(
        "hang", method="PUT", path=f"{active.name}/attempt-2/checkpoints/"
    )  # nor while the job service starts
    with stack.timed("job service killed, until another one has taken its runs over"):
        stack.service.start()
        until(lambda: all(run.status()[0].lease_term > lease_term for run in runs), "a new dispatcher takes over", 40)
    assert (active.status()[0].attempt, waiting.status()[0].state) == (2, "queued")

    when = time.monotonic()
    stack.kill_ray()
    lines = stack.service.text(f"/jobs/{active.job}/logs", source="0")
    assert "rank 0 of 2: begins" in lines
    rows = stack.service.ask("GET", f"/jobs/{active.job}/metrics")["data"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= before.step
    until(lambda: stack.shown(waiting)["wait"] == "the cluster does not answer", "the queue says so")
    stack.proxy.heal()
    stack.start_ray()
    stack.trains(active, 3, since=when, what="Ray's head killed and started again")
    second = took_over(stack, active, 3)
    for run, attempts in ((active, 3), (waiting, 1)):
        stack.reaches(run, "succeeded")
        stack.check_succeeded(run, attempts)
    assert parents(active) == [None, first, second]
    assert any("and left no result" in change.reason for change in active.status()[0].history)


def test_storage_that_fails_now_and_then_and_is_away_for_a_while(stack: Stack) -> None:
    """Let every fifth request of a run fail, and kill the server during training and publishing."""
    faults = random.Random(0)
    stack.proxy.fail_at_random(lambda: faults.choice(STORE_FAULTS) if faults.random() < 0.2 else "ok")
    run = outage(stack, OUTAGE_SECONDS, save_every=100)
    failed = {mode: sum(stack.proxy.count(verb, mode) for verb in ("GET", "PUT", "DELETE")) for mode in STORE_FAULTS}
    assert min(failed.values()) > 0, failed
    print(f"{sum(failed.values())} requests failed: {failed}")
    assert len(parents(run)) == 1


def test_preemption_cancel_and_resume(stack: Stack) -> None:
    job = stack.submit("low", tiny_model("one", **SHORT), tiny_model("two", **SHORT))
    both = [stack.run(job, "one"), stack.run(job, "two")]
    stack.proxy.fail("slow", method="PUT", path=f"/runs/{job}/")  # so that these two do not end too early
    for run in both:
        stack.saves(run)

    high = stack.submit_one(tiny_model("high", **SHORT), priority=10)
    with stack.timed("submitted with a higher priority, until one of two has saved and left"):
        until(lambda: any(run.status()[0].state == "queued" for run in both), "one of them makes room")
    preempted, other = sorted(both, key=lambda run: run.status()[0].state != "queued")
    step = preempted.checkpoints()[-1].step
    assert preempted.status()[0].reason == f"preempted by a run of priority 10; continues from step {step}"

    with stack.timed("cancel, until all is saved"):
        stack.service.ask("POST", f"/jobs/{job}/cancel", json={"models": [other.model]})
        status = stack.reaches(other, "cancelled")
    left = other.checkpoints()[-1]
    assert status.reason == f"cancelled by key 'tests'; a resume continues from step {left.step}"
    assert other.heartbeat(1).step == left.step
    until(lambda: preempted.status()[0].attempt == 2, "the preempted one starts again")
    stack.service.ask("POST", f"/jobs/{job}/resume", json={"models": [other.model]})
    until(lambda: stack.shown(other)["wait"] == "needs 1 CPU, free: 0 CPUs", "the resumed one waits")

    stack.trains(preempted, 2)
    assert took_over(stack, preempted, 2).step == step
    with stack.timed("cancel --now"):
        stack.service.ask("POST", f"/jobs/{job}/cancel", json={"models": [preempted.model], "now": True})
        stack.reaches(preempted, "cancelled")
    newest = preempted.checkpoints()[-1]  # read now: a run that has ended keeps few of them
    assert "Killed: cancelled by key" in stack.service.text(f"/jobs/{job}/logs", model=preempted.model)
    stack.service.ask("POST", f"/jobs/{job}/resume")
    stack.proxy.heal()
    for run, attempts in ((high, 1), (other, 2), (preempted, 3)):
        stack.reaches(run, "succeeded")
        stack.check_succeeded(run, attempts)
    assert parents(other) == [None, left]
    assert preempted.attempt_start(3).parent == newest == parents(preempted)[-1]
    until(lambda: job not in stack.jobs.open(), "the job is closed")
    assert stack.shown_job(job)["state"] == "succeeded"


def test_an_elastic_run_loses_a_node_and_gets_one_back(stack: Stack) -> None:
    """Kill a node: Ray notices it only after a while; an attempt that waits for the node then gives up by itself.

    The run has far more steps than it makes here, so that it cannot end before it grows; it is cancelled at the end.
    """
    most = CPUS + 1
    with stack.join(cpus=1) as node:
        until(lambda: stack.capacity() == most, "the node joins", 60)
        workers = {"min": 1, "max": most}
        run = stack.submit_one(tiny_model("elastic", workers, max_steps=1_000_000, save_every=100))
        stack.saves(run, 1)
        assert (run.attempt_start(1).world_size, run.status()[0].workers) == (most, most)
        when = time.monotonic()
        node.kill()
    smaller = stack.trains_with(run, CPUS, since=when, what="a node with one of three workers killed")
    first = took_over(stack, run, smaller)
    with stack.join(cpus=1):
        when = time.monotonic()
        larger = stack.trains_with(run, most, since=when, what="a node joins, and the run grows")
        second = took_over(stack, run, larger)
        stack.saves(run, larger)
        stack.service.ask("POST", f"/jobs/{run.job}/cancel")
        status = stack.reaches(run, "cancelled")
    check_history(status)
    assert larger == smaller + 1
    assert parents(run) == [None, first, second]
    assert any(change.reason.startswith(f"grows from {CPUS} to {most} workers") for change in status.history)
    last = run.checkpoints()[-1]
    assert (last.attempt, run.manifest(last).lineage.world_size) == (larger, most)
    assert status.reason == f"cancelled by key 'tests'; a resume continues from step {last.step}"
    samples = [row["samples"] for row in metric_rows(run)]
    assert samples == [12 * step for step in range(1, last.step + 1)]


# ---- sweeps


@pytest.mark.long
def test_storage_away_for_a_minute(stack: Stack) -> None:
    outage(stack, 60)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_kills_at_random_times(stack: Stack) -> None:
    """Kill a worker, the driver or the job service 30 times, at random moments of a run."""
    chance, kills, number = random.Random(1), 0, 0
    while kills < 30:
        number += 1
        run = stack.submit_one(tiny_model(f"sweep-{number}", 2, **LONG))
        for _ in range(2):  # a third attempt without a checkpoint would fail the run
            pause = chance.uniform(0, 25)
            victim = chance.choice(("worker", "driver", "service"))
            deadline = time.monotonic() + pause
            until(lambda: run.status()[0].state == "succeeded" or time.monotonic() > deadline, "a moment", 60)  # noqa: B023
            attempt = run.status()[0].attempt
            if run.status()[0].state == "succeeded":
                break
            if victim == "service":
                stack.service.kill()
                stack.service.start()
            else:
                pids = stack.drivers(run, attempt) if victim == "driver" else stack.workers(run, attempt)[:1]
                if not pids:
                    continue
                stack.kill(*pids)
            kills += 1
        stack.reaches(run, "succeeded", timeout=200)
        stack.check_succeeded(run)
    print(f"{kills} kills in {number} runs: 0 failed, 0 wrong weights, 0 steps twice")


def outage(stack: Stack, seconds: float, save_every: int = 25) -> Run:
    """Stop the store for a while in training and in publishing: the same attempt continues."""
    run = stack.submit_one(tiny_model(f"outage-{seconds}", max_steps=500, save_every=save_every))
    stack.saves(run)
    attempt = run.status()[0].attempt
    no_checkpoints = stack.proxy.fail("503", method="PUT", path=f"{run.name}/attempt-{attempt}/checkpoints/")
    until(lambda: run.heartbeat(attempt).phase == "waiting for storage", "the heartbeat says that it waits")
    until(lambda: stack.shown(run)["phase"] == "waiting for storage", "the API shows it")
    no_versions = stack.proxy.fail("503", method="PUT", path=f"models/{run.model}/blobs/")
    stop_storage(stack, seconds)
    step = run.checkpoints()[-1].step
    stack.proxy.heal(no_checkpoints)
    with stack.timed(f"storage back after {seconds} s in training, until the next checkpoint"):
        until(lambda: run.checkpoints()[-1].step > step, "training goes on")

    stack.reaches(run, "publishing")
    until(lambda: stack.received_write(f"models/{run.model}/blobs/"), "publishing has begun to write")
    stop_storage(stack, seconds)
    stack.proxy.heal(no_versions)
    with stack.timed(f"storage back after {seconds} s in publishing, until it is published"):
        status = stack.reaches(run, "succeeded")
    stack.check_succeeded(run, attempt)
    states = [change.state for change in status.history]
    assert states[-4:] == ["starting", "running", "publishing", "succeeded"]
    assert "failed" not in states
    return run


def stop_storage(stack: Stack, seconds: float) -> None:
    stack.s3.kill()
    time.sleep(seconds)
    stack.s3.start()


def took_over(stack: Stack, run: Run, attempt: int) -> CheckpointRef:
    """Check that an attempt continues from the newest manifest of the attempt before it; return that checkpoint."""
    parent = run.attempt_start(attempt).parent
    whole = [ref for ref in run.checkpoints() if ref.attempt < attempt]
    assert parent == (stack.newest_manifest(run, attempt - 1) or whole[-1])
    return parent
