"""Test drivers as Ray Jobs against a dashboard whose answers a test sets."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.cluster import dashboard
from services.cluster.dashboard import Dashboard
from services.cluster.ray_start import MEMORY_LABEL
from services.dispatch.backends import ray_jobs
from services.dispatch.backends.base import DRIVER_MEMORY, LOST, Capacity, submission_id
from services.dispatch.backends.ray_jobs import RayJobsBackend


def test_names_are_short_and_never_ambiguous() -> None:
    assert submission_id("a-b", "c", 7) != submission_id("a", "b-c", 7)
    assert submission_id("a-b", "c", 7) == submission_id("a-b", "c", 7) != submission_id("a-b", "c", 8)
    assert len(submission_id("j" * 72, "m" * 63, 100_000)) <= 47


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
    """A dashboard whose answers a test sets, by method and path; None: no answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[str] = []
        self.answers: dict[str, tuple[int, Any] | None] = {}
        self.bodies: dict[str, Any] = {}  # of the last requests
        monkeypatch.setattr(dashboard, "SILENCE_SECONDS", 0.0)
        self.backend = RayJobsBackend("http://ray")
        self.backend.dashboard.client = httpx.Client(base_url="http://ray", transport=httpx.MockTransport(self.answer))
        self.path = f"/api/jobs/{submission_id('j', 'm', 1)}"

    def answer(self, request: httpx.Request) -> httpx.Response:
        target = f"{request.method} {request.url.path}".replace(self.path, "JOB")
        self.requests.append(target)
        self.bodies[target] = json.loads(request.content or b"null")
        answer = self.answers.get(target)
        if answer is None:
            raise httpx.ReadTimeout("no answer")
        return httpx.Response(answer[0], json=answer[1])


def test_a_submission_without_an_answer_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.start("file:///s", "j", "m", 1, 1)
    assert driver.poll() is None, "its state is unknown"
    ray.answers["GET JOB"] = 404, {}
    assert driver.poll() is None, "sent again"
    ray.answers["POST /api/jobs/"] = 200, {"submission_id": "x"}
    assert driver.poll() is None, "sent again and accepted"
    ray.answers["GET JOB"] = 200, {"status": "PENDING"}
    assert driver.poll() is None
    assert ray.requests.count("POST /api/jobs/") == 3
    ray.answers["GET JOB"] = 404, {}
    assert driver.poll() == LOST, "accepted, and lost with the head"
    ray.answers["GET JOB"] = None
    assert driver.poll() == LOST, "an end is final"
    assert ray.requests.count("POST /api/jobs/") == 3


def test_a_submission_is_accepted_although_its_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.start("file:///s", "j", "m", 1, 1)
    ray.answers["GET JOB"] = 200, {"status": "RUNNING"}
    assert driver.poll() is None
    ray.answers["GET JOB"] = 200, {"status": "FAILED", "driver_exit_code": None}
    assert driver.poll() == LOST, "its supervisor died"
    assert ray.requests.count("POST /api/jobs/") == 1


def test_a_cluster_that_accepts_nothing_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    monkeypatch.setattr(ray_jobs, "ACCEPT_SECONDS", 0.0)
    ray.answers = {"POST /api/jobs/": (500, {}), "GET JOB": (404, {})}
    assert ray.backend.start("file:///s", "j", "m", 1, 1).poll() == LOST


@pytest.mark.parametrize("status", [401, 403, 500, 502, 503])
def test_after_a_broken_answer_the_state_is_unknown(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.answers = {"GET JOB": (status, {}), "GET /api/v0/nodes": (status, {})}
    assert ray.backend.find("j", "m", 1).poll() is None
    assert ray.backend.capacity() is None


def test_a_kill_without_an_answer_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.find("j", "m", 1)
    driver.kill()
    ray.answers["GET JOB"] = 200, {"status": "RUNNING"}
    assert driver.poll() is None
    ray.answers["POST JOB/stop"] = 200, {"stopped": True}
    assert driver.poll() is driver.poll() is None
    assert ray.requests.count("POST JOB/stop") == 3
    ray.answers["GET JOB"] = 200, {"status": "STOPPED"}
    assert driver.poll() == -signal.SIGTERM


def test_a_driver_killed_before_it_was_accepted_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    driver = ray.backend.start("file:///s", "j", "m", 1, 1)
    ray.answers = {"POST JOB/stop": (404, {}), "GET JOB": (404, {})}
    driver.kill()
    assert driver.poll() == LOST
    assert ray.requests.count("POST /api/jobs/") == 1


def test_no_node_yet_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes(*states: str) -> dict[str, Any]:
        return listed(*(node(state) for state in states))

    ray = Ray(monkeypatch)
    ray.answers["GET /api/v0/nodes"] = 200, nodes()
    assert ray.backend.capacity() is None
    ray.answers["GET /api/v0/nodes"] = 200, nodes("ALIVE", "DEAD", "ALIVE")
    assert ray.backend.capacity() == Capacity(8, 2, drivers=6)


def test_a_node_has_room_for_whole_drivers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    small = node("ALIVE", head=False) | {"resources_total": {"CPU": 4.0, "memory": DRIVER_MEMORY * 1.9}}
    without = node("ALIVE", head=False) | {"resources_total": {"CPU": 4.0}}
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE"), small, without)
    assert ray.backend.capacity() == Capacity(12, 1, drivers=4)
    ray.backend.max_cpus = 64
    assert ray.backend.capacity() == Capacity(12, 1, max_cpus=64), "an autoscaler adds nodes for drivers, too"


def test_the_memory_of_workers_is_that_of_the_largest_node_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(memory: int | None, **resources: float) -> dict[str, Any]:
        labels = {} if memory is None else {MEMORY_LABEL: str(memory)}
        return node("ALIVE", head=False) | {"resources_total": resources, "labels": labels}

    ray = Ray(monkeypatch)
    head = node("ALIVE") | {"resources_total": {"memory": 1.0}, "labels": {MEMORY_LABEL: "99"}}
    for nodes, memory, gpu_memory in (
        ([], None, None),
        ([of(6, CPU=2.0), of(8, CPU=2.0)], 8, None),
        ([of(6, CPU=2.0, GPU=1.0), of(8, CPU=2.0)], 8, 6),
        ([of(6, CPU=2.0), of(None, CPU=2.0)], None, None),  # a node of another release may have more
    ):
        ray.answers["GET /api/v0/nodes"] = 200, listed(head, *nodes)
        capacity = ray.backend.capacity()
        assert capacity is not None
        assert (capacity.memory, capacity.gpu_memory) == (memory, gpu_memory)
    ray.backend.max_cpus = 64
    ray.answers["GET /api/v0/nodes"] = 200, listed(head, of(6, CPU=2.0))
    assert ray.backend.capacity() == Capacity(2, 0, max_cpus=64), "an autoscaler may add larger nodes"


def test_a_driver_asks_for_the_memory_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.backend.start("file:///s", "j", "m", 1, 1)
    assert ray.bodies["POST /api/jobs/"]["entrypoint_memory"] == DRIVER_MEMORY
    assert ray.bodies["POST /api/jobs/"]["entrypoint_num_cpus"] == 0


def test_a_driver_without_a_place_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.answers["GET JOB"] = 200, {"status": "PENDING"}
    driver = ray.backend.find("j", "m", 1)
    assert (driver.poll(), driver.waiting) == (None, ""), "it has only just been sent"
    monkeypatch.setattr(ray_jobs, "PENDING_SECONDS", -1.0)
    assert (driver.poll(), driver.waiting) == (None, "waits for a node with 768 MiB of memory for its driver")
    ray.answers["GET JOB"] = 200, {"status": "RUNNING"}
    assert (driver.poll(), driver.waiting) == (None, "")


def test_a_driver_of_a_lost_node_is_lost_and_one_of_another_node_outlives_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray(monkeypatch)
    worker = node("ALIVE", head=False) | {"node_id": "worker"}
    ray.answers["GET JOB"] = 200, {"status": "RUNNING", "start_time": 2_000, "driver_node_id": "worker"}
    assert ray.backend.find("j", "m", 1).poll() is None, "the nodes are not listed yet"
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE", began=3_000), worker)
    assert ray.backend.capacity()
    assert ray.backend.find("j", "m", 1).poll() is None
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE", began=3_000), worker | {"state": "DEAD"})
    assert ray.backend.capacity()
    assert ray.backend.find("j", "m", 1).poll() == LOST


def test_a_driver_on_a_node_that_has_just_joined_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE"))
    assert ray.backend.capacity()
    ray.answers["GET JOB"] = 200, {"status": "RUNNING", "start_time": 2_000, "driver_node_id": "new"}
    ray.answers["GET /api/v0/nodes"] = None
    assert ray.backend.find("j", "m", 1).poll() is None, "whether the node is there is not known"
    joined = node("ALIVE", began=2_000, head=False) | {"node_id": "new"}
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE"), joined)
    assert ray.backend.find("j", "m", 1).poll() is None


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_driver_of_the_previous_head_is_lost(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that keeps its state on disk still shows the driver as running."""
    ray = Ray(monkeypatch)
    worker = node("ALIVE", began=9_000, head=False)
    ray.answers["GET JOB"] = 200, {"status": status, "start_time": 2_000}
    assert ray.backend.find("j", "m", 1).poll() is None, "the nodes are not listed yet"
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("ALIVE", began=1_000), worker)
    assert ray.backend.capacity()
    assert ray.backend.find("j", "m", 1).poll() is None
    ray.answers["GET /api/v0/nodes"] = 200, listed(node("DEAD", began=1_000), worker, node("ALIVE", began=3_000))
    assert ray.backend.capacity()
    assert ray.backend.find("j", "m", 1).poll() == LOST


def test_the_token_is_the_one_that_ray_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Return a node as the dashboard lists it."""
    has = {"CPU": 4.0, "GPU": 1.0, "memory": 3.5 * DRIVER_MEMORY}
    return {"node_id": "n", "state": state, "resources_total": has, "start_time_ms": began, "is_head_node": head}


def listed(*nodes: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"result": {"result": list(nodes)}}}


def test_a_poll_takes_the_answer_that_a_look_got(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.answers["GET JOB"] = 200, {"status": "SUCCEEDED"}
    driver = ray.backend.find("j", "m", 1)
    driver.look()
    ray.answers["GET JOB"] = None
    assert driver.poll() == 0
    driver.look()
    assert ray.requests == ["GET JOB"], "an end is final"
