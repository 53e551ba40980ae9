"""Test how the dispatcher follows RayJobs: what a watch costs, and what it survives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from genmodels import threads
from services.dispatch.backends import kube_api, kube_watch
from services.dispatch.backends.base import LOST, submission_id
from services.dispatch.backends.kube_api import KubeApi
from tests.support import fake_kubernetes
from tests.support.kubernetes_platform import Platform, api
from tests.support.ray_node import until
from tests.support.scripted_cluster import data, in_no_time, submit
from tests.support.scripted_drivers import obedient
from tests.support.storages import MemoryStorage

__all__ = ["api", "data", "in_no_time"]

LABELS = {"app.kubernetes.io/managed-by": "genmodels"}


def add(api: fake_kubernetes.KubeApi, *names: str) -> None:
    for name in names:
        meta = {"name": name, "labels": dict(LABELS), "creationTimestamp": "2026-01-01T00:00:00Z"}
        api.jobs[name] = {"metadata": meta, "spec": {}, "status": {"jobDeploymentStatus": "Running"}}
        api.touch(api.jobs[name])


def remove(api: fake_kubernetes.KubeApi, name: str) -> None:
    api.jobs[name]["metadata"]["finalizers"] = []
    api.delete(name)


def follow(client: KubeApi, api: fake_kubernetes.KubeApi) -> list[str]:
    """Return the names of the RayJobs once the client has all changes."""
    until(lambda: client.jobs() is not None and client.watch.version == str(api.version), "it catches up", 10, 0.002)
    return sorted(client.jobs() or ())


# ---- what it costs


@pytest.mark.parametrize("runs", [10, 200])
def test_at_rest_there_is_one_open_request_whatever_the_number_of_runs(
    api: fake_kubernetes.KubeApi, tmp_path: Path, data: Path, runs: int
) -> None:
    storage = MemoryStorage()
    models = [f"m{i}" for i in range(runs)]
    platform = Platform(api, tmp_path, storage, **{model: [obedient] for model in models})
    for begin in range(0, runs, 10):
        submit(storage, data, "many", *models[begin : begin + 10])
    until(lambda: platform.reconcile() or len(platform.operator.started) == runs, "all runs are started", 100, 0)
    platform.reconcile()
    api.requests.clear()
    for _ in range(3):
        platform.catch_up()
        platform.dispatcher.dispatch_once(platform.lease_term)
    assert api.requests == []
    assert sum(len(str(job)) for job in (platform.backend.api.jobs() or {}).values()) < 1000 * runs


def test_a_watch_that_ends_continues_without_a_list(
    api: fake_kubernetes.KubeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_api, "WATCH_SECONDS", 0)
    add(api, "a", "b")
    client = KubeApi()
    assert follow(client, api) == ["a", "b"]
    until(lambda: api.requests.count("watch rayjobs") > 3, "watches follow each other", 10)
    add(api, "c")
    assert follow(client, api) == ["a", "b", "c"]
    assert api.requests.count("list rayjobs") == 1
    assert client.watch.failures == 0


def test_the_first_list_comes_in_pages(api: fake_kubernetes.KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "PAGE", 2)
    add(api, *"abcde")
    api.expired = True
    client = KubeApi()
    until(lambda: client.jobs() is None and client.watch.failures, "410: the list begins again", 10)
    api.expired = False
    assert follow(client, api) == list("abcde")


# ---- what it survives


def test_changes_between_two_watches_are_not_missed(api: fake_kubernetes.KubeApi) -> None:
    add(api, "a", "b")
    client = KubeApi()
    follow(client, api)
    with api.lock:
        api.drop_watches()
        remove(api, "a")
        api.status("b", jobDeploymentStatus="Complete")
        add(api, "c")
    assert follow(client, api) == ["b", "c"]
    jobs = client.jobs()
    assert jobs is not None
    assert jobs["b"]["status"]["jobDeploymentStatus"] == "Complete"
    assert api.requests.count("list rayjobs") == 1


def test_a_rayjob_without_a_spec_harms_no_other(api: fake_kubernetes.KubeApi) -> None:
    """One that was applied by hand: Kubernetes accepts it."""
    add(api, "a", "b")
    del api.jobs["a"]["spec"]
    client = KubeApi()
    assert follow(client, api) == ["a", "b"]


@pytest.mark.parametrize("as_event", [False, True])
def test_a_version_that_is_too_old_is_listed_again(api: fake_kubernetes.KubeApi, as_event: bool) -> None:
    add(api, "a", "b")
    client = KubeApi()
    follow(client, api)
    with api.lock:
        remove(api, "a")
        api.events.clear()  # compacted: no watch can bring this change
        api.oldest = api.version
        if as_event:
            status = {
                "kind": "Status",
                "code": 410,
                "message": "too old resource version",
                "metadata": {"labels": LABELS},
            }
            api.events.append((api.version + 1, "ERROR", status))
        else:
            api.drop_watches()
    until(lambda: api.requests.count("list rayjobs") >= 2, "it is listed again", 10)
    api.events.clear()
    assert follow(client, api) == ["b"]


def test_a_silent_watch_is_noticed(
    api: fake_kubernetes.KubeApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kube_api, "SILENCE_SECONDS", 0.2)
    client = KubeApi()
    follow(client, api)
    api.silent = True
    add(api, "a")
    until(lambda: "was silent" in caplog.text, "the silence is noticed", 10)
    api.silent = False
    assert follow(client, api) == ["a"]


def test_the_right_to_watch_is_named(api: fake_kubernetes.KubeApi, caplog: pytest.LogCaptureFixture) -> None:
    api.role.remove(("rayjobs", "watch"))
    client = KubeApi()
    until(lambda: client.jobs() is None and client.watch.failures > 2, "it fails", 10)
    errors = [line for line in caplog.messages if "needs the verb 'watch' for 'rayjobs'" in line]
    assert len(errors) == 1
    api.role.add(("rayjobs", "watch"))
    follow(client, api)


def test_health_shows_a_watch_that_is_refused(api: fake_kubernetes.KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    client = KubeApi()
    assert client.watch.stalled() is None, "a dispatcher that waits for the lease watches nothing"
    follow(client, api)
    api.role.remove(("rayjobs", "watch"))
    api.drop_watches()
    until(lambda: client.watch.failures > 2, "it is refused", 10)
    later = time.monotonic() + threads.STALLED_SECONDS + 1
    monkeypatch.setattr("genmodels.threads.time.monotonic", lambda: later)
    assert "'kube-watch' has made no progress" in str(client.watch.stalled())


def test_an_outage_of_the_api_server_makes_no_job_service_unwell(
    api: fake_kubernetes.KubeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = KubeApi()
    follow(client, api)
    api.away = True
    until(lambda: client.jobs() is None, "it is away", 10)
    monkeypatch.setattr(threads, "STALLED_SECONDS", 5.0)
    before = client.watch.failures
    until(lambda: client.watch.failures > before + 1, "it is tried again", 10)
    assert client.watch.stalled() is None


def test_a_failed_watch_is_opened_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    assert [kube_watch._backoff(failures) for failures in (1, 2, 3, 9, 99)] == [0.5, 1.0, 2.0, 10.0, 10.0]


# ---- what is not in memory yet


def test_a_rayjob_newer_than_the_watch_is_no_lost_one(api: fake_kubernetes.KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    job = submit(storage, data, "newer", "a")
    api.silent = True  # the watch brings nothing
    driver = platform.backend.start(storage.url, job, "a", 1, 1)
    assert driver.poll() is None
    assert platform.backend.find(job, "a", 1).poll() is None, "also for a dispatcher that has just taken over"
    assert not driver.reason
    del api.jobs[submission_id(job, "a", 1)]
    assert driver.poll() == LOST


def test_no_answer_about_a_missing_rayjob_changes_nothing(
    api: fake_kubernetes.KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    job = submit(storage, data, "unknown", "a")
    driver = platform.backend.find(job, "a", 1)
    api.ill = [500] * 3
    assert driver.poll() is None
    assert driver.poll() == LOST
