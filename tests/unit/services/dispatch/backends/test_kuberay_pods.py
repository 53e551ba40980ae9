"""Test runs whose pods do not start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.dispatch.backends import kube_api
from services.dispatch.backends.base import submission_id
from tests.support.fake_kubernetes import KubeApi
from tests.support.kubernetes_platform import STATUSES, Platform, api
from tests.support.ray_node import until
from tests.support.scripted_cluster import data, in_no_time, send_command, state, submit
from tests.support.storages import MemoryStorage

__all__ = ["api", "data", "in_no_time"]


def obstruct(platform: Platform, status: str) -> None:
    platform.operator.placed, platform.operator.pending = False, STATUSES[status]


def test_an_image_that_does_not_exist_ends_the_run(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    obstruct(platform, "no such tag")
    name = submit(storage, data, "image", "a")
    status = platform.until("a", "failed", name)
    assert status.reason.startswith("the image registry.example/genmodels:2.60.0-0.1.O cannot be pulled (ErrImagePull")
    assert status.attempt == 1
    assert not api.jobs
    assert not api.pods
    send_command(storage, name, "a", "resume", "queued")
    platform.operator.placed = True
    assert platform.until("a", "succeeded", name).attempt == 2


def test_what_pods_wait_for_is_the_reason(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    obstruct(platform, "no GPU")
    name = submit(storage, data, "room", "a")
    platform.reconcile(5)
    reason = "waits for nodes with room (Unschedulable: Insufficient nvidia.com/gpu, node(s) had untolerated taint(s))"
    assert (state(storage, name, "a").state, state(storage, name, "a").reason) == ("starting", reason)
    obstruct(platform, "no GPU, later")
    changes = len(platform.reasons(name, "a"))
    platform.reconcile(5)
    assert len(platform.reasons(name, "a")) == changes
    message = 'FailedCreateHeadPod\npods "r" is forbidden: exceeded quota: compute, requested: cpu=1, used: 8'
    platform.operator.conditions = [{"type": "ReplicaFailure", "status": "True", "message": message}]
    api.pods.clear()
    platform.reconcile(5)
    assert state(storage, name, "a").reason.startswith("a pod is refused (exceeded quota: compute, requested: cpu=1")
    api.status(submission_id(name, "a", 1), jobDeploymentStatus="Failed", reason="PreRunningDeadlineExceeded")
    platform.operator.placed = True
    assert platform.until("a", "succeeded", name).attempt == 2
    assert any("not there in time" in each and "exceeded quota" in each for each in platform.reasons(name, "a"))


def test_of_two_partly_placed_runs_the_later_gives_way(api: KubeApi, tmp_path: Path, data: Path) -> None:
    """Four nodes for two runs of three pods: each run gets two, and neither can start."""
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    platform.operator.nodes, platform.operator.pending = 4, STATUSES["no GPU"]
    name = submit(storage, data, "blocked", "a", "b", workers=2)
    platform.reconcile(8)
    assert [state(storage, name, model).attempt for model in "ab"] == [1, 1], "each may wait for nodes that come"
    assert not platform.operator.started
    platform.options = dataclasses.replace(platform.options, give_way_seconds=0.0)
    platform.restart()
    attempts = {model: platform.until(model, "succeeded", name).attempt for model in "ab"}
    assert sorted(attempts.values())[0] == 1, "the earlier run keeps its pods"
    later = max(attempts, key=lambda model: attempts[model])
    reason = "gave its nodes to an earlier run; waits for nodes with room (Unschedulable: Insufficient nvidia.com/gpu"
    assert any(each.startswith(reason) for each in platform.reasons(name, later))
    assert state(storage, name, later).no_progress_attempts == 0


def test_one_list_of_pods_serves_all_runs(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_api, "PODS_SECONDS", 60.0)
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    obstruct(platform, "no GPU")
    name = submit(storage, data, "many", *"abcde")
    platform.reconcile(6)
    assert api.requests.count("list pods") == 1
    api.role.remove(("pods", "list"))
    monkeypatch.setattr(kube_api, "PODS_SECONDS", 0.0)
    platform.reconcile(3)
    assert state(storage, name, "a").reason == "waits for KubeRay to make its cluster"


def test_a_pod_of_another_owner_is_not_the_runs(api: KubeApi, tmp_path: Path, data: Path) -> None:
    """A pod for debugging with copied labels, and an image that does not exist."""
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "copied", "a")
    labels = {"genmodels/rayjob": submission_id(name, "a", 1)}
    api.pods["debug"] = {"metadata": {"name": "debug", "labels": labels}, "status": STATUSES["no such tag"]}
    obstruct(platform, "no GPU")
    platform.reconcile(5)
    assert state(storage, name, "a").reason.startswith("waits for nodes")
    platform.operator.placed = True
    assert platform.until("a", "succeeded", name).attempt == 1


def test_the_pods_of_other_runs_hide_none(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_api, "PAGE", 2)
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    for i in range(9):
        api.pods[f"a{i}"] = {
            "metadata": {"name": f"a{i}", "labels": {"genmodels/rayjob": "r-0"}},
            "status": STATUSES["no GPU"],
        }
    obstruct(platform, "no such tag")
    assert "cannot be pulled" in platform.until("a", "failed", submit(storage, data, "last", "a")).reason


@pytest.mark.parametrize("answer", ["<html>", '{"items": [', '{"items": null}', "[]", '"\xff"'])
def test_an_answer_that_is_no_list_changes_nothing(api: KubeApi, tmp_path: Path, data: Path, answer: str) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "damaged", "a")
    obstruct(platform, "no GPU")
    platform.reconcile(5)
    before = platform.reasons(name, "a")
    api.damaged = answer.encode("latin-1")
    api.drop_watches()
    until(lambda: platform.backend.api.jobs() is None, "the watch fails", 10)
    assert platform.backend.api.has_pods("r-0") is None
    assert platform.backend.api.pending_pods("r-0") == []
    platform.dispatcher.dispatch_once(platform.lease_term)
    assert platform.reasons(name, "a") == before
    api.damaged, platform.operator.placed = None, True
    assert platform.until("a", "succeeded", name).attempt == 1


def test_each_request_has_a_timeout(api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "TIMEOUT", (2.0, 0.2))
    client = kube_api.KubeApi()
    with api.lock:  # the server takes requests, and does not answer
        assert client.create({"metadata": {"name": "a"}})[0] == 0
        client.delete("a")


def test_a_rayjob_without_numbers_harms_no_other(api: KubeApi, tmp_path: Path) -> None:
    """One that was made by hand with the platform's label."""
    backend = Platform(api, tmp_path, MemoryStorage()).backend
    created = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    spec = {"rayClusterSpec": {"workerGroupSpecs": [{"groupName": "workers"}]}}
    labels = {"app.kubernetes.io/managed-by": "genmodels"}
    api.jobs["by-hand"] = {
        "metadata": {**created, "name": "by-hand", "labels": labels},
        "spec": spec,
        "status": {"jobDeploymentStatus": "Initializing"},
    }
    assert not backend.has_earlier({"metadata": {**created, "name": "z"}, "spec": spec})
