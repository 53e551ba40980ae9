"""Test that a run whose pods all end at once loses no step: with its real driver and workers, ended as pods are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from genmodels.errors import StorageUnavailable
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.records import Heartbeat, Result, State, Status
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.local.platform import submit
from services.train import pre_stop
from services.train.pre_stop import save_first
from tests.support.live_processes import is_alive, processes
from tests.support.paths import ROOT
from tests.support.ray_node import until
from tests.support.storages import MemoryStorage
from tests.support.tiny_jobs import job, make_data, model

GRACE_SECONDS = 90


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a run that would train for long, and saves nothing by itself."""
    storage = open_storage(f"file://{tmp_path}/storage")
    train = {"max_steps": 10**6, "save_every": 10**6, "eval_every": 10**6}
    entry = model(make_data(tmp_path), "minigpt", **train) | {"scaling": {"num_workers": 2}}
    run = Run(storage, submit(storage, job("preempted", entry)), "minigpt")
    arguments = ["--storage", storage.url, "--job", run.job, "--model", run.model, "--attempt", "1"]
    driver = subprocess.Popen([sys.executable, "-m", "tests.support.plain_driver", *arguments], cwd=ROOT)
    try:
        yield run
    finally:
        for pid in processes(storage.url):
            os.kill(pid, signal.SIGKILL)
        driver.wait()


def end_pod(run: Run, pid: int) -> int:
    """End a process as the kubelet ends a container: hook, SIGTERM, and SIGKILL after the grace period."""
    arguments = ["--storage", run.storage.url, "--job", run.job, "--model", run.model, "--attempt", "1"]
    command = [sys.executable, "-m", "services.train.pre_stop", *arguments, "--seconds", str(GRACE_SECONDS)]
    code = subprocess.run(command, cwd=ROOT, timeout=2 * GRACE_SECONDS).returncode
    if is_alive(pid):
        os.kill(pid, signal.SIGTERM)
    until(lambda: not is_alive(pid), "it ends", GRACE_SECONDS)
    return code


def step(run: Run) -> int:
    heartbeat = run.heartbeat(1)
    return heartbeat.step if heartbeat and heartbeat.phase == "training" else 0


@pytest.mark.slow
def test_pods_that_all_end_at_once_lose_no_step(run: Run) -> None:
    until(lambda: step(run) > 2, "it trains", 120)
    pids = processes(run.storage.url)
    assert len(pids) == 3, "the driver and two workers"
    before = step(run)
    with ThreadPoolExecutor(len(pids)) as pods:
        codes = list(pods.map(lambda pid: end_pod(run, pid), pids))
    assert codes == [0, 0, 0]
    result = run.result(1)
    assert result is not None
    assert result.outcome == "stopped"
    (saved,) = run.checkpoints()
    assert saved.step == result.step >= before
    assert [row["step"] for row in metric_rows(run)] == [*range(1, saved.step + 1)], "each step that was made is saved"
    assert all(command.action == "stop" for command in run.commands(1))


# ---- when there is nothing to wait for


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(pre_stop, "LOOK_SECONDS", 0.0)
    return Run(MemoryStorage(), "j", "m")


def training(run: Run) -> Run:
    run.write_heartbeat(1, Heartbeat(phase="training", step=7, max_steps=9))
    return run


def test_an_attempt_that_has_ended_ends_the_hook(quiet: Run) -> None:
    training(quiet).write_result(1, Result(outcome="succeeded"))
    assert save_first(quiet, 1, 60.0, "the pod ends")
    assert not quiet.commands(1)


@pytest.mark.parametrize("phase", [None, "starting"])
def test_an_attempt_that_has_made_no_step_ends_the_hook(quiet: Run, phase: str | None) -> None:
    if phase:
        quiet.write_heartbeat(1, Heartbeat(phase="starting", max_steps=9))
    assert save_first(quiet, 1, 60.0, "the pod ends")
    assert not quiet.commands(1)


def test_an_attempt_that_is_killed_ends_the_hook(quiet: Run) -> None:
    training(quiet).send_command("kill", 1, "no progress")
    assert save_first(quiet, 1, 60.0, "the pod ends")


@pytest.mark.parametrize(("state", "attempt"), [("queued", 1), ("failed", 1), ("starting", 2)])
def test_a_driver_that_died_ends_the_hook(quiet: Run, state: State, attempt: int) -> None:
    training(quiet).write_status(Status(state="running", attempt=1).to(state, "it died", attempt=attempt), None)
    assert save_first(quiet, 1, 60.0, "the pod ends")
    assert not quiet.commands()


def test_a_damaged_status_does_not_keep_an_attempt_from_saving(quiet: Run) -> None:
    training(quiet).storage.put(f"{quiet.prefix}/status.json", b"{")
    assert not save_first(quiet, 1, 0.05, "the pod ends")
    assert [command.action for command in quiet.commands(1)] == ["stop"]


@pytest.mark.slow
def test_a_storage_that_is_silent_does_not_hold_the_pod(quiet: Run) -> None:
    """The listener takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "r"}
        command = [sys.executable, "-m", "services.train.pre_stop", "--storage", "s3://bucket/p", "--job", "j"]
        command += ["--model", "m", "--attempt", "1", "--seconds", "1"]
        environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": url}
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=30, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the storage has not answered in time" in done.stderr


def test_an_attempt_that_does_not_end_is_given_up(quiet: Run) -> None:
    assert not save_first(training(quiet), 1, 0.05, "the pod ends")
    assert [command.reason for command in quiet.commands(1)] == ["the pod ends"]


def test_an_outage_of_the_storage_is_waited_for(quiet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outages = iter([StorageUnavailable("away"), StorageUnavailable("away")])
    send = Run.send_command

    def stop(run: Run, *arguments: str) -> object:
        if outage := next(outages, None):
            raise outage
        run.write_result(1, Result(outcome="stopped"))
        return send(run, *arguments)

    monkeypatch.setattr(Run, "send_command", stop)
    assert save_first(training(quiet), 1, 60.0, "the pod ends")
    assert len(quiet.commands(1)) == 1
