"""Test drivers as Ray Jobs of a real cluster, controlled only over HTTP."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genmodels.runs.jobs import Jobs
from genmodels.runs.log_lines import log_lines
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.cluster.ray_start import MEMORY_LABEL
from services.dispatch.backends import ray_jobs
from services.dispatch.backends.base import DRIVER_MEMORY, LOST, Capacity, driver_command, submission_id
from services.dispatch.backends.ray_jobs import RayJobsBackend
from tests.support.driver_commands import command, end_of
from tests.support.live_processes import processes
from tests.support.ray_node import HEAD, JoinedNode, RayHead, until
from tests.support.tiny_jobs import job, make_data, model

MEMORY = 5 * 2**30


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    labels = f"{MEMORY_LABEL}={MEMORY}"
    with RayHead(tmp_path_factory.mktemp("ray") / "head.log", num_cpus=2, labels=labels) as head:
        yield head


def test_a_real_attempt(head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and publish; the publication is a task of Ray, as on Kubernetes."""
    monkeypatch.setattr(ray_jobs, "driver_command", lambda *run: [*driver_command(*run), "--publish-on-worker"])
    storage = open_storage((tmp_path / "storage").as_uri())
    spec = job("tiny", model(make_data(tmp_path), "minigpt", max_steps=3, save_every=3, eval_every=3))
    name, _ = Jobs(storage).submit(spec)
    driver = head.backend.start(storage.url, name, "minigpt", 1, 1)
    assert end_of(driver, 120) == 0
    result = Run(storage, name, "minigpt").result(1)
    assert result is not None
    assert (result.outcome, result.step, result.version) == ("succeeded", 3, 1), result.message
    lines = [line.line for line in log_lines(Run(storage, name, "minigpt"), "driver")]
    assert any(line.endswith(f"publishes on node {HEAD}") for line in lines)
    shown = head.backend.dashboard.ask("GET", f"/api/jobs/{submission_id(name, 'minigpt', 1)}")
    assert shown is not None
    assert shown.json()["metadata"] == {"job": name, "model": "minigpt", "attempt": "1"}
    assert os.environ["RAY_AUTH_TOKEN"] not in shown.text

    # A later reader gets the same exit code, and a second start of the same attempt starts nothing.
    assert RayJobsBackend(head.dashboard).find(name, "minigpt", 1).poll() == 0
    assert end_of(head.backend.start(storage.url, name, "minigpt", 1, 1)) == 0
    assert Run(storage, name, "minigpt").result(1) == result


def test_codes_of_ray_jobs(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = head.backend.capacity()
    assert capacity
    assert (capacity.cpus, capacity.gpus) == (2, 0)
    assert capacity.drivers, "Ray tells how much memory its nodes have"
    assert capacity.memory == MEMORY, "as `ray start` was told by `ray_start_command`"
    assert RayJobsBackend(head.dashboard, 8, 2).capacity() == Capacity(2, 0, max_cpus=8, max_gpus=2)
    assert head.backend.find("j", "unknown", 1).poll() == LOST
    mark = f"genmodels-test-{uuid.uuid4()}"
    command(monkeypatch, "bash", "-c", f"sleep 1000; : {mark}")
    sleeper = head.backend.start("file:///s", "j", "sleeper", 1, 1)
    command(monkeypatch, "bash", "-c", "exit 3")
    assert end_of(head.backend.start("file:///s", "j", "m", 1, 1)) == 3
    until(lambda: processes(mark), "the sleeper runs")
    assert sleeper.poll() is None
    attempt = RayJobsBackend(head.dashboard).find("j", "sleeper", 1)  # as a restarted dispatcher does
    assert attempt.poll() is None
    attempt.kill()
    assert end_of(attempt) == end_of(sleeper) == -signal.SIGTERM
    assert processes(mark) == []


def test_ray_tells_when_its_head_and_a_driver_began(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "true")
    assert head.backend.capacity()
    assert end_of(head.backend.start("file:///s", "j", "quick", 1, 1)) == 0
    shown = head.backend.dashboard.ask("GET", f"/api/jobs/{submission_id('j', 'quick', 1)}")
    assert shown is not None
    running = {**shown.json(), "status": "RUNNING"}
    assert not head.backend.is_lost(running)
    assert head.backend.is_lost({**running, "driver_node_id": "another"})
    before = time.time() - 24 * 3600
    assert head.backend.is_lost({**running, "driver_node_id": None, "start_time": before * 1000})


@pytest.mark.long
def test_drivers_go_where_memory_is_and_the_next_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has room for one driver, another node for one more."""
    monkeypatch.setattr(ray_jobs, "PENDING_SECONDS", 10.0)
    command(monkeypatch, "sleep", "1000")
    room = int(DRIVER_MEMORY * 1.5)
    with RayHead(tmp_path / "head.log", 0, memory=room) as head, JoinedNode(tmp_path / "n.log", head, 1, memory=room):
        until(lambda: (capacity := head.backend.capacity()) and capacity.drivers == 2, "the node joins")
        drivers = [head.backend.start("file:///s", "j", f"m{i}", 1, 1) for i in range(3)]
        names = [submission_id("j", f"m{i}", 1) for i in range(3)]

        def shown() -> list[dict[str, Any]]:
            answers = [head.backend.dashboard.ask("GET", f"/api/jobs/{name}") for name in names]
            return [answer.json() for answer in answers if answer]

        def states() -> list[str]:
            return sorted(job["status"] for job in shown())

        until(lambda: states() == ["PENDING", "RUNNING", "RUNNING"], "two have a place")
        assert len({job["driver_node_id"] for job in shown() if job["status"] == "RUNNING"}) == 2
        waiting = next(i for i, job in enumerate(shown()) if job["status"] == "PENDING")
        until(lambda: drivers[waiting].poll() is None and "768 MiB" in drivers[waiting].waiting, "it says why")
        drivers[(waiting + 1) % 3].kill()
        until(lambda: states() == ["RUNNING", "RUNNING", "STOPPED"], "it takes the place")
