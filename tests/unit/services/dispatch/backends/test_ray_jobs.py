"""Where drivers run: processes of this machine, and Ray Jobs of a real cluster, by HTTP alone."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from genmodels.runs.jobs import Jobs
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.cluster import dashboard
from services.cluster.dashboard import Dashboard
from services.dispatch.backends import base, local_process, ray_jobs
from services.dispatch.backends.base import LOST, Capacity, Driver, submission_id
from services.dispatch.backends.local_process import SubprocessBackend
from services.dispatch.backends.ray_jobs import RayJobsBackend
from tests.support.live_processes import is_alive, processes
from tests.support.ray_node import RayHead, until
from tests.support.tiny_jobs import job, make_data, model


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with RayHead(tmp_path_factory.mktemp("ray") / "head.log", num_cpus=2) as head:
        yield head


def end_of(driver: Driver, seconds: float = 60.0) -> int:
    until(lambda: driver.poll() is not None, "the driver ends", seconds)
    code = driver.poll()
    assert code is not None
    return code


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Drivers run this instead."""
    for backend in (local_process, ray_jobs):
        monkeypatch.setattr(backend, "driver_command", lambda *_: list(words))


# ---- processes of this machine


def test_a_driver_as_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "bash", "-c", "echo $GREETING; exit 3")
    backend = SubprocessBackend(tmp_path / "logs", {"GREETING": "hello"}, Capacity(3, 1))
    assert end_of(backend.start("file:///s", "j", "m", 2, 1)) == 3
    assert backend.log("m", 2).read_text() == "hello\n"
    assert backend.find("j", "m", 2).poll() == 3
    assert backend.capacity() == Capacity(3, 1)
    nobody = backend.find("j", "m", 3)
    nobody.kill()
    assert nobody.poll() == LOST


def test_a_killed_process_takes_its_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "bash", "-c", "sleep 1000 & echo $!; wait")
    backend = SubprocessBackend(tmp_path, {})
    driver = backend.start("file:///s", "j", "m", 1, 1)
    child = int(until(lambda: backend.log("m", 1).read_text(), "the child starts"))
    assert driver.poll() is None
    driver.kill()
    assert driver.poll() == -signal.SIGKILL
    until(lambda: not is_alive(child), "the child is gone", 5)


def test_what_a_driver_is_told() -> None:
    words = base.driver_command("s3://b/p q", "j-1", "m", 2, 3)
    assert (
        " ".join(words[1:]) == "-P -m services.train --storage s3://b/p q --job j-1 --model m --attempt 2 --workers 3"
    )
    assert "s3://b/p q" in words


# ---- Ray Jobs


def test_names_are_short_and_never_ambiguous() -> None:
    assert submission_id("a-b", "c", 7) != submission_id("a", "b-c", 7)
    assert submission_id("a-b", "c", 7) == submission_id("a-b", "c", 7) != submission_id("a-b", "c", 8)
    assert len(submission_id("j" * 72, "m" * 63, 100_000)) <= 47


def test_a_real_attempt(head: RayHead, tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "storage").as_uri())
    spec = job("tiny", model(make_data(tmp_path), "minigpt", max_steps=3, save_every=3, eval_every=3))
    name, _ = Jobs(storage).submit(spec)
    driver = head.backend.start(storage.url, name, "minigpt", 1, 1)
    assert end_of(driver, 120) == 0
    result = Run(storage, name, "minigpt").result(1)
    assert result is not None
    assert (result.outcome, result.step, result.version) == ("succeeded", 3, 1), result.message
    shown = head.backend.dashboard.ask("GET", f"/api/jobs/{submission_id(name, 'minigpt', 1)}")
    assert shown is not None
    assert shown.json()["metadata"] == {"job": name, "model": "minigpt", "attempt": "1"}
    assert os.environ["RAY_AUTH_TOKEN"] not in shown.text

    # Whoever comes later finds how it ended, and whoever asks twice starts nothing.
    assert RayJobsBackend(head.dashboard).find(name, "minigpt", 1).poll() == 0
    assert end_of(head.backend.start(storage.url, name, "minigpt", 1, 1)) == 0
    assert Run(storage, name, "minigpt").result(1) == result


def test_codes_of_ray_jobs(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head.backend.capacity() == Capacity(2, 0)
    assert RayJobsBackend(head.dashboard, 8, 2).capacity() == Capacity(2, 0, max_cpus=8, max_gpus=2)
    assert head.backend.find("j", "nobody", 1).poll() == LOST
    mark = f"genmodels-test-{uuid.uuid4()}"
    command(monkeypatch, "bash", "-c", f"sleep 1000; : {mark}")
    sleeper = head.backend.start("file:///s", "j", "sleeper", 1, 1)
    command(monkeypatch, "bash", "-c", "exit 3")
    assert end_of(head.backend.start("file:///s", "j", "m", 1, 1)) == 3
    until(lambda: processes(mark), "the sleeper runs")
    assert sleeper.poll() is None
    found = RayJobsBackend(head.dashboard).find("j", "sleeper", 1)  # as a dispatcher that was started again
    assert found.poll() is None
    found.kill()
    assert end_of(found) == end_of(sleeper) == -signal.SIGTERM
    assert processes(mark) == []


# ---- a cluster that does not answer


def test_a_dashboard_that_hangs_costs_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = RayJobsBackend(f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        drivers = [backend.find("j", "m", attempt) for attempt in range(20)]
        assert [driver.poll() for driver in drivers] == [None] * 20
        assert backend.capacity() is None
        drivers[0].kill()
        assert time.monotonic() - began < 2.0


class Ray:
    """A dashboard as a test wants it: answers by method and path, None for no answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, Any] | None] = {}
        monkeypatch.setattr(dashboard, "SILENCE_SECONDS", 0.0)
        self.backend = RayJobsBackend("http://ray")
        self.backend.dashboard.client = httpx.Client(base_url="http://ray", transport=httpx.MockTransport(self.answer))
        self.path = f"/api/jobs/{submission_id('j', 'm', 1)}"

    def answer(self, request: httpx.Request) -> httpx.Response:
        asked = f"{request.method} {request.url.path}".replace(self.path, "JOB")
        self.asked.append(asked)
        answer = self.answers.get(asked)
        if answer is None:
            raise httpx.ReadTimeout("no answer")
        return httpx.Response(answer[0], json=answer[1])


def test_a_submission_without_an_answer_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.start("file:///s", "j", "m", 1, 1)
    assert driver.poll() is None, "nobody can tell"
    ray.answers["GET JOB"] = 404, {}
    assert driver.poll() is None, "sent again"
    ray.answers["POST /api/jobs/"] = 200, {"submission_id": "x"}
    assert driver.poll() is None, "sent again and taken"
    ray.answers["GET JOB"] = 200, {"status": "PENDING"}
    assert driver.poll() is None
    assert ray.asked.count("POST /api/jobs/") == 3
    ray.answers["GET JOB"] = 404, {}
    assert driver.poll() == LOST, "taken, and lost with the head"
    ray.answers["GET JOB"] = None
    assert driver.poll() == LOST, "an end stays an end"
    assert ray.asked.count("POST /api/jobs/") == 3


def test_a_submission_that_was_taken_though_the_answer_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.start("file:///s", "j", "m", 1, 1)
    ray.answers["GET JOB"] = 200, {"status": "RUNNING"}
    assert driver.poll() is None
    ray.answers["GET JOB"] = 200, {"status": "FAILED", "driver_exit_code": None}
    assert driver.poll() == LOST, "its supervisor died"
    assert ray.asked.count("POST /api/jobs/") == 1


def test_a_cluster_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    monkeypatch.setattr(ray_jobs, "ACCEPT_SECONDS", 0.0)
    ray.answers = {"POST /api/jobs/": (500, {}), "GET JOB": (404, {})}
    assert ray.backend.start("file:///s", "j", "m", 1, 1).poll() == LOST


@pytest.mark.parametrize("status", [401, 403, 500, 502, 503])
def test_a_broken_answer_tells_nothing(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.answers = {"GET JOB": (status, {}), "GET /api/v0/nodes": (status, {})}
    assert ray.backend.find("j", "m", 1).poll() is None
    assert ray.backend.capacity() is None


def test_a_kill_without_an_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.find("j", "m", 1)
    driver.kill()
    ray.answers["GET JOB"] = 200, {"status": "RUNNING"}
    assert driver.poll() is None
    ray.answers["POST JOB/stop"] = 200, {"stopped": True}
    assert driver.poll() is driver.poll() is None
    assert ray.asked.count("POST JOB/stop") == 3
    ray.answers["GET JOB"] = 200, {"status": "STOPPED"}
    assert driver.poll() == -signal.SIGTERM


def test_one_that_is_killed_before_it_was_taken_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.start("file:///s", "j", "m", 1, 1)
    ray.answers = {"POST JOB/stop": (404, {}), "GET JOB": (404, {})}
    driver.kill()
    assert driver.poll() == LOST
    assert ray.asked.count("POST /api/jobs/") == 1


def test_no_node_yet_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes(*states: str) -> dict[str, Any]:
        return listed(*(node(state) for state in states))

    ray = Ray(monkeypatch)
    ray.answers["GET /api/v0/nodes"] = 200, nodes()
    assert ray.backend.capacity() is None
    ray.answers["GET /api/v0/nodes"] = 200, nodes("ALIVE", "DEAD", "ALIVE")
    assert ray.backend.capacity() == Capacity(8, 2)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_driver_of_the_head_before_is_lost(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that keeps its state on disk shows it as it was."""
    ray = Ray(monkeypatch)
    worker = node("ALIVE", began=9_000, head=False)
    ray.answers["GET JOB"] = 200, {"status": status, "start_time": 2_000}
    assert ray.backend.find("j", "m", 1).poll() is None, "nobody has asked for the nodes yet"
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE", began=1_000), worker)
    assert ray.backend.capacity()
    assert ray.backend.find("j", "m", 1).poll() is None
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("DEAD", began=1_000), worker, node("ALIVE", began=3_000))
    assert ray.backend.capacity()
    assert ray.backend.find("j", "m", 1).poll() == LOST


def test_ray_tells_when_its_head_and_a_driver_began(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "true")
    assert head.backend.capacity()
    assert end_of(head.backend.start("file:///s", "j", "quick", 1, 1)) == 0
    shown = head.backend.dashboard.ask("GET", f"/api/jobs/{submission_id('j', 'quick', 1)}")
    assert shown is not None
    running = {**shown.json(), "status": "RUNNING"}
    assert not head.backend.is_lost(running)
    before = time.time() - 24 * 3600
    assert head.backend.is_lost({**running, "start_time": before * 1000})


def test_the_token_is_found_as_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "one")
    (tmp_path / "token").write_text("two\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert Dashboard("http://ray").client.headers["authorization"] == "Bearer one"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert Dashboard("http://ray").client.headers["authorization"] == "Bearer two"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "authorization" not in Dashboard("http://ray").client.headers
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    assert Dashboard().client.base_url == "http://elsewhere:1"


def node(state: str, began: int = 1_000, head: bool = True) -> dict[str, Any]:
    """As the dashboard lists it."""
    has = {"CPU": 4.0, "GPU": 1.0}
    return {"state": state, "resources_total": has, "start_time_ms": began, "is_head_node": head}


def listed(*found: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"result": {"result": list(found)}}}
