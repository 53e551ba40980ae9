"""Test runs as RayJobs: a real dispatcher and the official client against a fake API server, KubeRay and Kueue."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from genmodels.errors import GenmodelsError
from genmodels.runs.store import Run
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage, open_storage
from services.dispatch import attempt
from services.dispatch.backends import kube_api, kuberay
from services.dispatch.backends.base import LOST, PREEMPTED, REFUSED, Capacity, submission_id
from services.dispatch.backends.kuberay import KubeRayBackend
from services.dispatch.backends.rayjob import KubeOptions, Template, label
from services.dispatch.dispatcher import Dispatcher
from services.jobs import app as jobs_service
from tests.support.fake_kuberay import Operator, refusal
from tests.support.fake_kubernetes import KubeApi
from tests.support.kuberay_pods import build_pods
from tests.support.paths import ROOT
from tests.support.ray_node import until
from tests.support.scripted_cluster import data, in_no_time, send_command, spec, state, submit
from tests.support.scripted_drivers import Driver, Script, dies, ends, obedient, succeeds
from tests.support.storages import MemoryStorage

__all__ = ["data", "in_no_time"]

POD = {"spec": {"containers": [{"name": "ray", "image": "genmodels:test", "resources": {"limits": {"cpu": "2"}}}]}}
TEMPLATE: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "any", "labels": {"app.kubernetes.io/part-of": "genmodels"}},
    "spec": {
        "rayClusterSpec": {
            "rayVersion": "2.60.0",
            "headGroupSpec": {"template": POD},
            "workerGroupSpecs": [
                {"groupName": "workers", "template": POD},
                {"groupName": "gpu-workers", "template": POD},
            ],
        }
    },
}
STATUSES: dict[str, Any] = yaml.safe_load((ROOT / "tests/k8s/fixtures/pod_statuses.yaml").read_text())
SHIPPED = sorted((ROOT / "k8s").rglob("rayjob.template.yaml"))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    monkeypatch.setattr(kube_api, "LIST_SECONDS", 0.0)
    monkeypatch.setattr(kube_api, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(kube_api, "PODS_SECONDS", 0.0)
    monkeypatch.setattr(kube_api, "TIMEOUT", (2.0, 20.0))
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(TEMPLATE))
    with KubeApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield api


class Platform:
    """A dispatcher on Kubernetes; the n-th attempt of a model follows its n-th script, the last one again."""

    def __init__(
        self, api: KubeApi, template: Path | str, storage: Storage, queue: str | None = None, **scripts: list[Script]
    ) -> None:
        """Args:
        template: the folder of its file, or the name of its object.
        """
        self.api, self.storage, self.scripts = api, storage, scripts
        source = (
            {"template_object": template} if isinstance(template, str) else {"template": template / "template.yaml"}
        )
        self.options = KubeOptions(**source, queue=queue)
        self.operator = Operator(api, self.driver)
        self.most = Capacity(0, 0)
        self.restart()

    def restart(self) -> None:
        """Start a new dispatcher without any state in memory."""
        self.backend = KubeRayBackend(self.storage, self.options, self.most)
        self.dispatcher = Dispatcher(self.storage, self.backend)
        self.lease_term = getattr(self, "lease_term", 0) + 1

    def driver(self, job: dict[str, Any]) -> Any:
        name, attempt = (
            job["metadata"]["annotations"]["genmodels/run"],
            int(job["metadata"]["labels"]["genmodels/attempt"]),
        )
        run = Run(self.storage, *name.split("/"))
        scripts = self.scripts.get(run.model, [succeeds])
        return Driver(scripts[min(attempt, len(scripts)) - 1](run, attempt))

    def reconcile(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.dispatcher.dispatch_once(self.lease_term)
            self.operator.reconcile()

    def until(self, model: str, wanted: str, job: str, attempt: int = 1) -> Any:
        """Reconcile until the run is in this state, in this attempt or a later one."""
        for _ in range(100):
            status = state(self.storage, job, model)
            if status.state == wanted and status.attempt >= attempt:
                return status
            self.reconcile()
        pytest.fail(f"{model}: {status.state} ({status.reason}), attempt {status.attempt}")

    def reasons(self, job: str, model: str) -> list[str]:
        return [change.reason for change in state(self.storage, job, model).history]


# ---- from the queue to the end


def test_runs_are_carried_to_their_end(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[dies, succeeds])
    name = submit(storage, data, "two", "a", "b", workers=2)
    for model, attempts in (("a", 2), ("b", 1)):
        status = platform.until(model, "succeeded", name)
        assert (status.attempt, status.workers) == (attempts, 2)
    assert [rayjob for rayjob, _ in platform.operator.started] == [
        submission_id(name, "a", 1),
        submission_id(name, "b", 1),
        submission_id(name, "a", 2),
    ]
    failure = "the driver died (AppFailed: Job entrypoint command failed with exit code 137, last available logs:)"
    assert f"{failure}; continues from step 0" in platform.reasons(name, "a")
    assert len(api.jobs) == 3, "they stay for inspection"
    monkeypatch.setattr(kuberay, "KEEP_SECONDS", 0.0)
    platform.reconcile(3)
    assert not api.jobs


@pytest.mark.slow
def test_a_real_attempt_outlives_its_dispatcher(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage((tmp_path / "storage").as_uri())
    platform = Platform(api, tmp_path, storage)

    def process(job: dict[str, Any]) -> Any:
        command = shlex.split(job["spec"]["entrypoint"])
        assert command[:4] == ["python", "-P", "-m", "services.train"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-m", "tests.support.plain_driver", *command[4:]], env=environment)

    platform.operator.driver = process
    name = submit(storage, data, "real", "a", workers=2)
    try:
        platform.until("a", "starting", name)
        platform.reconcile(3)
        platform.restart()
        until(
            lambda: platform.reconcile() or state(storage, name, "a").state in ("succeeded", "failed"), "it ends", 240
        )
    finally:
        platform.operator.close()
    status = state(storage, name, "a")
    assert (status.state, status.attempt, status.lease_term) == ("succeeded", 1, 2), status.reason
    result = Run(storage, name, "a").result(1)
    assert result is not None
    assert result.version == 1
    start = Run(storage, name, "a").attempt_start(1)
    assert start is not None
    assert start.world_size == 2


# ---- restarts and lost answers


def test_a_dispatcher_killed_after_it_made_a_rayjob(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "adopted", "a")
    platform.dispatcher.dispatch_once(1)
    assert list(api.jobs) == [submission_id(name, "a", 1)]
    platform.restart()
    assert platform.until("a", "succeeded", name).attempt == 1
    assert len(platform.operator.started) == 1


def test_a_dispatcher_killed_before_it_made_one(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "unborn", "a")
    monkeypatch.setattr(platform.backend, "start", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        platform.dispatcher.dispatch_once(1)
    assert (state(storage, name, "a").state, api.jobs) == ("starting", {})
    platform.restart()
    status = platform.until("a", "succeeded", name)
    assert (status.attempt, status.no_progress_attempts) == (2, 0)


def test_a_rayjob_is_made_once_though_the_answer_was_lost(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "lost", "a")
    created = kube_api.KubeApi.create

    def lose(self: Any, job: Any) -> Any:
        api.lost = True
        return created(self, job)

    platform.backend.api.create = lose.__get__(platform.backend.api)
    assert platform.until("a", "succeeded", name).attempt == 1
    assert len(platform.operator.started) == 1


def test_an_outage_of_the_api_server_changes_nothing(
    api: KubeApi, tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[obedient])
    name = submit(storage, data, "out", "a")
    platform.until("a", "running", name)
    other = submit(storage, data, "later", "b")
    api.away = True
    platform.reconcile(5)
    assert platform.backend.capacity() is None
    assert (state(storage, name, "a").state, state(storage, other, "b").state) == ("running", "queued")
    assert sum("list rayjobs" in line for line in caplog.messages) == 1
    api.away = False
    platform.until("b", "succeeded", other)
    assert len(platform.operator.started) == 2


# ---- ends of a RayJob

REFUSAL = {"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed"}


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0, "left no result"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, -15, "was stopped"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}, 1, "the driver died"),
        (REFUSAL | {"message": "spec is odd", "rayClusterName": ""}, REFUSED, "spec is odd"),
        (REFUSAL | {"message": "edited while it runs", "jobStatus": "RUNNING"}, REFUSED, "edited while it runs"),
        ({"jobDeploymentStatus": "Retrying"}, LOST, "KubeRay was about to start it again"),
        ({"reason": "PreRunningDeadlineExceeded"}, LOST, "no room for its pods"),
        ({"reason": "DeadlineExceeded", "jobStatus": "RUNNING"}, LOST, "activeDeadlineSeconds"),
        ({"reason": "JobStatusCheckTimeoutExceeded", "jobStatus": "RUNNING"}, LOST, "head pod was lost"),
        ({"reason": "SubmissionFailed"}, LOST, "could not be submitted"),
        ({"reason": "SomethingNew"}, 1, "SomethingNew"),
    ],
)
def test_what_becomes_of_a_rayjob(
    api: KubeApi, tmp_path: Path, data: Path, status: Any, code: int, reason: str
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    job = submit(storage, data, "ends", "a")
    driver = platform.backend.start(storage.url, job, "a", 1, 2)
    name = submission_id(job, "a", 1)
    for _ in range(2):
        platform.operator.reconcile()
    assert driver.poll() is None
    platform.operator.clings = True
    api.status(name, **{"jobDeploymentStatus": "Failed"} | status)
    ended = status.get("jobStatus") in ("SUCCEEDED", "STOPPED", "FAILED") or status.get("rayClusterName") == ""
    polled = driver.poll()
    if not ended:  # its driver may still run: first all its pods must go
        assert polled is None
        platform.operator.reconcile()
        assert api.pods
        assert driver.poll() is None
        platform.operator.clings = False
        platform.operator.reconcile()
        polled = driver.poll()
        assert name not in api.jobs
    assert polled == code
    assert reason in driver.reason
    assert platform.backend.find(job, "a", 1).poll() == (code if ended else LOST), "also for a later dispatcher"


def test_a_deadline_starts_the_next_attempt_after_the_first_has_gone(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[obedient, succeeds])
    name = submit(storage, data, "dead", "a")
    platform.until("a", "running", name)
    first = submission_id(name, "a", 1)
    api.status(first, jobDeploymentStatus="Failed", reason="DeadlineExceeded")
    platform.operator.clings = True
    platform.reconcile(5)
    assert len(platform.operator.started) == 1, "its pods are there"
    platform.operator.clings = False
    platform.until("a", "succeeded", name)
    assert any("activeDeadlineSeconds" in reason for reason in platform.reasons(name, "a"))


def test_a_head_that_is_lost(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[obedient, succeeds])
    name = submit(storage, data, "head", "a")
    platform.until("a", "running", name)
    platform.operator.lose_head(submission_id(name, "a", 1))
    status = platform.until("a", "succeeded", name)
    assert status.attempt == 2
    assert "its head pod was lost; continues from step 0" in platform.reasons(name, "a")
    assert submission_id(name, "a", 1) not in api.jobs


def test_deleted_by_hand_it_goes_on_when_its_pods_have_gone(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[obedient, obedient, succeeds])
    name = submit(storage, data, "hand", "a")
    for number in (1, 2):
        platform.until("a", "running", name, number)
        platform.operator.clings = True
        api.delete(submission_id(name, "a", number))
        platform.reconcile(6)
        assert submission_id(name, "a", number) not in api.jobs
        assert len(platform.operator.started) == number
        if number == 2:  # a node that is lost keeps its pods for ever
            monkeypatch.setattr(kuberay, "GONE_SECONDS", -1.0)
            break
        platform.operator.clings = False
        api.pods.clear()
    assert platform.until("a", "succeeded", name).attempt == 3
    assert "its RayJob was deleted; continues from step 0" in platform.reasons(name, "a")


def change_template(folder: Path, **changes: Any) -> None:
    """Write the template with a changed spec, or a changed group of workers."""
    template = copy.deepcopy(TEMPLATE)
    group = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][changes.pop("at", 0)]
    group |= changes.pop("group", {})
    template["spec"] |= changes
    (folder / "template.yaml").write_text(yaml.safe_dump(template))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tll": 3}, "Kubernetes refuses the RayJob: "),
        (
            {"group": {"resources": {"CPU": "2"}, "rayStartParams": {"num-gpus": "1"}}},
            "KubeRay refuses the RayJob (ValidationFailed: The RayJob spec is invalid: resource fields should not be",
        ),
    ],
)
def test_what_is_refused_fails_at_once_with_its_words(
    api: KubeApi, tmp_path: Path, data: Path, changes: Any, reason: str
) -> None:
    change_template(tmp_path, **changes)
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "refused", "a")
    status = platform.until("a", "failed", name)
    assert status.reason.startswith(reason)
    assert status.attempt == 1


def test_a_state_that_is_not_known_is_reported_and_bounded(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    platform.operator.placed = False
    name = submit(storage, data, "odd", "a")
    platform.reconcile(2)
    api.status(submission_id(name, "a", 1), jobDeploymentStatus="Pausing")
    platform.reconcile()
    problem = "KubeRay reports a state that is not known here: Pausing"
    assert (state(storage, name, "a").state, state(storage, name, "a").reason) == ("starting", problem)
    monkeypatch.setenv("GENMODELS_SLOW_SECONDS", "-1")
    platform.reconcile()
    monkeypatch.delenv("GENMODELS_SLOW_SECONDS")
    monkeypatch.setattr(attempt, "KILL_SECONDS", -1.0)
    platform.operator.placed = True
    assert platform.until("a", "succeeded", name).attempt == 2
    assert any("no progress for" in reason and problem in reason for reason in platform.reasons(name, "a"))


# ---- pods that do not start


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


# ---- Kueue


def test_kueue_admits_and_preempts(api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, queue="training", a=[obedient, succeeds])
    platform.operator.admits = False
    monkeypatch.setenv("GENMODELS_SLOW_SECONDS", "-1")  # any silence would be a hang
    name = submit(storage, data, "queued", "a")
    platform.reconcile(10)
    status = state(storage, name, "a")
    assert (status.state, status.reason) == ("starting", "waits for Kueue to admit it to queue training")
    assert not platform.operator.started
    monkeypatch.delenv("GENMODELS_SLOW_SECONDS")
    platform.operator.admits = True
    platform.until("a", "running", name)
    platform.operator.clings = True
    platform.operator.preempt(submission_id(name, "a", 1))
    platform.reconcile(6)
    assert state(storage, name, "a").attempt == 1, "its pods have not gone"
    platform.operator.clings = False
    status = platform.until("a", "succeeded", name)
    assert (status.attempt, status.no_progress_attempts) == (2, 0)
    assert "preempted: Kueue suspended it; continues from step 0" in platform.reasons(name, "a")
    assert submission_id(name, "a", 1) not in api.jobs


def test_preempted_while_no_dispatcher_looked(api: KubeApi, tmp_path: Path, data: Path) -> None:
    """The new dispatcher sees that the suspended attempt had begun, and does not resume it."""
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, queue="training", a=[obedient, succeeds])
    name = submit(storage, data, "unseen", "a")
    platform.until("a", "running", name)
    platform.operator.admits = False
    platform.operator.preempt(submission_id(name, "a", 1))
    for _ in range(3):
        platform.operator.reconcile()
    platform.restart()
    driver = platform.backend.find(name, "a", 1)
    assert driver.poll() is None
    platform.operator.reconcile()
    assert driver.poll() == PREEMPTED
    platform.operator.admits = True
    assert platform.until("a", "succeeded", name).attempt == 2


def test_one_that_waits_in_kueues_queue_is_cancelled(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, queue="training")
    platform.operator.admits = False
    name = submit(storage, data, "never", "a")
    platform.reconcile(5)
    send_command(storage, name, "a", "stop", "cancelled")
    platform.until("a", "cancelled", name)
    assert not api.jobs
    assert not platform.operator.started


def test_cancelled_it_saves_first(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[obedient, succeeds])
    name = submit(storage, data, "stop", "a")
    platform.until("a", "running", name)
    send_command(storage, name, "a", "stop", "cancelled")
    assert "a resume continues from step 8" in platform.until("a", "cancelled", name).reason
    send_command(storage, name, "a", "resume", "queued")
    platform.until("a", "succeeded", name)
    assert len(platform.operator.started) == 2


# ---- answers of the API server


def test_missing_rights_are_logged_once_by_name(
    api: KubeApi, tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    name = submit(storage, data, "rights", "a")
    api.role.remove(("rayjobs", "create"))
    platform.reconcile(5)
    status = state(storage, name, "a")
    assert (status.state, status.attempt) == ("starting", 1)
    assert status.reason.startswith("Kubernetes does not take the RayJob: ")
    warnings = [line for line in caplog.messages if "403" in line]
    assert len(warnings) == 1
    assert "needs the verb 'create' for 'rayjobs'" in warnings[0]
    api.role.add(("rayjobs", "create"))
    platform.until("a", "succeeded", name)


def test_a_token_that_is_not_known(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path, "another")))
    platform = Platform(api, tmp_path, MemoryStorage())
    assert platform.backend.capacity() is platform.backend.capacity() is None
    assert sum("401" in line for line in caplog.messages) == 1
    assert "another" not in caplog.text


def test_a_failed_answer_of_the_api_server_is_retried_at_once(api: KubeApi, tmp_path: Path) -> None:
    platform = Platform(api, tmp_path, MemoryStorage())
    api.ill = [429, 503]
    assert platform.backend.capacity() == Capacity(0, 0, unlimited=True)
    assert len(api.requests) == 3
    api.ill = [500] * 3
    assert platform.backend.capacity() is None
    assert platform.backend.capacity() is not None


def test_a_list_comes_in_pages(api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "PAGE", 2)
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage)
    submit(storage, data, "many", *"abcde")
    platform.dispatcher.dispatch_once(1)
    jobs = platform.backend.api.jobs()
    assert jobs is not None
    assert len(jobs) == 5
    api.expired = True
    assert platform.backend.api.jobs() is None, "410: the next call starts the list again"


def test_all_runs_of_a_round_share_one_list(
    api: KubeApi, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, **{name: [obedient] for name in "abcde"})
    submit(storage, data, "many", *"abcde")
    platform.reconcile(5)
    monkeypatch.setattr(kube_api, "LIST_SECONDS", 60.0)
    platform.backend.api._forget()
    api.requests.clear()
    platform.dispatcher.dispatch_once(1)
    assert api.requests == ["list rayjobs"]


# ---- the template that is an object of the cluster

GROUP = {"replicas": 1, "minReplicas": 1, "maxReplicas": 1, "template": POD}
CLUSTER = {
    "headGroupSpec": {"rayStartParams": {}, "template": POD},
    "workerGroupSpecs": [{"groupName": "workers", "rayStartParams": {}, **GROUP}],
}
OBJECT: dict[str, Any] = {
    **TEMPLATE,
    "metadata": {
        "name": "genmodels-template",
        "labels": {"app.kubernetes.io/part-of": "genmodels", "app.kubernetes.io/instance": "argo"},
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"},
    },
    "spec": {"suspend": True, "shutdownAfterJobFinishes": True, "rayClusterSpec": CLUSTER},
}


def with_image(image: str) -> dict[str, Any]:
    changed = copy.deepcopy(OBJECT)
    changed["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = image
    return changed


def image_of(rayjob: dict[str, Any]) -> str:
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]
    return str(head["template"]["spec"]["containers"][0]["image"])


@pytest.mark.parametrize("queue", [None, "q"])
def test_each_start_reads_the_template_that_is_an_object(api: KubeApi, data: Path, queue: str | None) -> None:
    """An applied change is in the next attempt; the template itself neither runs nor is swept away."""
    api._create(OBJECT)
    storage = MemoryStorage()
    platform = Platform(api, "genmodels-template", storage, queue, m=[obedient])
    first = submit(storage, data, "n", "m")
    platform.until("m", "running", first)
    (before,) = [job for name, job in api.jobs.items() if name != "genmodels-template"]
    assert image_of(before) == "genmodels:test"
    assert before["metadata"]["labels"].items() >= {"app.kubernetes.io/part-of": "genmodels"}.items()
    assert "app.kubernetes.io/instance" not in before["metadata"]["labels"], "Argo CD would delete it as not its own"
    assert "kubectl.kubernetes.io/last-applied-configuration" not in before["metadata"]["annotations"]
    api.jobs["genmodels-template"]["spec"] = with_image("genmodels:next")["spec"]
    second = submit(storage, data, "other", "m")
    platform.until("m", "running", second)
    others = {name: image_of(job) for name, job in api.jobs.items() if name != before["metadata"]["name"]}
    del others["genmodels-template"]
    assert set(others.values()) == {"genmodels:next"}
    assert image_of(before) == "genmodels:test"
    assert not [name for name, _ in platform.operator.started if name == "genmodels-template"]


@pytest.mark.parametrize(
    ("template", "reason"), [(None, "not found"), ({"suspend": True, "rayClusterSpec": {}}, "lacks 'workerGroupSpecs'")]
)
def test_a_template_object_that_cannot_be_used_ends_the_run(
    api: KubeApi, data: Path, template: dict[str, Any] | None, reason: str
) -> None:
    if template is not None:
        api._create(OBJECT)
        api.jobs["genmodels-template"]["spec"] = template
    storage = MemoryStorage()
    platform = Platform(api, "genmodels-template", storage)
    job = submit(storage, data, "n", "m")
    assert reason in platform.until("m", "failed", job).reason


def test_a_start_waits_for_an_api_server_that_does_not_answer(api: KubeApi, data: Path) -> None:
    api._create(OBJECT)
    storage = MemoryStorage()
    platform = Platform(api, "genmodels-template", storage, m=[obedient])
    job = submit(storage, data, "n", "m")
    api.ill = [500] * 40
    platform.reconcile(3)
    assert state(storage, job, "m").state != "failed"
    api.ill = []
    platform.until("m", "running", job)


# ---- the RayJob made from the template


def of(data: Path, use_gpu: bool = False, workers: int = 1) -> JobSpec:
    one = spec(data, "n", "m", workers=workers)
    scaling = one.models[0].scaling.model_copy(update={"use_gpu": use_gpu})
    return one.model_copy(update={"models": [one.models[0].model_copy(update={"scaling": scaling})]})


@pytest.mark.parametrize("template", [None, *SHIPPED], ids=lambda path: path.parent.name if path else "minimal")
@pytest.mark.parametrize("use_gpu", [False, True])
def test_every_rayjob_is_valid_and_sized(
    api: KubeApi, tmp_path: Path, data: Path, template: Path | None, use_gpu: bool
) -> None:
    options = KubeOptions(
        template=template or tmp_path / "template.yaml", queue="q", priorities=[("low", -9), ("high", 5)]
    )
    model = of(data, use_gpu, 3).models[0].model_copy(update={"name": "m" * 63})
    body = Template(options).fill("s3://bucket/a b", "j" * 72, model, 2, 3, 5)
    api._create(body)
    assert refusal(body) == ""
    name, meta, made = submission_id("j" * 72, "m" * 63, 2), body["metadata"], body["spec"]
    assert (meta["name"], made["jobId"], made["backoffLimit"], made["suspend"]) == (name, name, 0, True)
    assert (made["submissionMode"], made["shutdownAfterJobFinishes"]) == ("HTTPMode", True)
    assert (
        meta["labels"]
        | {
            "genmodels/job": label("j" * 72),
            "genmodels/model": "m" * 63,
            "genmodels/attempt": "2",
            "kueue.x-k8s.io/queue-name": "q",
            "kueue.x-k8s.io/priority-class": "high",
        }
        == meta["labels"]
    )
    assert meta["annotations"]["genmodels/run"] == f"{'j' * 72}/{'m' * 63}"
    command = shlex.split(made["entrypoint"])
    assert command[:6] == ["python", "-P", "-m", "services.train", "--storage", "s3://bucket/a b"]
    assert command[-5:] == ["--attempt", "2", "--workers", "3", "--publish-on-worker"]
    (group,) = made["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    assert group["rayStartParams"]["num-cpus"] == "1"
    assert made["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") in ((1, "1") if use_gpu else (None,))  # Kubernetes takes text and numbers
    for pod in build_pods(body):
        (hook,) = (each["lifecycle"]["preStop"]["exec"]["command"] for each in pod["spec"]["containers"])
        assert hook[:4] == ["python", "-P", "-m", "services.train.pre_stop"]
        assert hook[4:-2] == command[4:-3], "storage, job, model and attempt, as the driver"
        assert int(hook[-1]) == pod["spec"]["terminationGracePeriodSeconds"] - 20
        assert {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "0"} in pod["spec"]["containers"][0]["env"]
        assert pod["metadata"]["labels"]["genmodels/rayjob"] == name
    if template is None:
        assert group["groupName"] == ("gpu-workers" if use_gpu else "workers")


@pytest.mark.parametrize("resources", [{"CPU": "4", "node": "1"}, {"node": "1"}])
def test_a_group_with_resources_of_ray_has_no_num_cpus(
    api: KubeApi, tmp_path: Path, data: Path, resources: dict[str, str]
) -> None:
    """KubeRay refuses a group that has both."""
    change_template(tmp_path, group={"resources": resources})
    body = Template(KubeOptions(template=tmp_path / "template.yaml")).fill("s3://b", "j", of(data).models[0], 1, 2, 0)
    assert refusal(body) == ""
    (group,) = body["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["rayStartParams"] == {}
    assert group["resources"] == {"CPU": "1", **resources}, "one worker for each pod, unless the template says more"


@pytest.mark.parametrize(
    ("gpus", "workers", "pods"),
    [("8", 8, [8]), (8, 16, [8, 8]), ("8", 3, [3]), ("4", 6, [3, 3]), ("4", 5, [3, 3]), ("1", 2, [1, 1])],
)
def test_a_pod_of_several_gpus_has_a_worker_for_each(
    api: KubeApi, tmp_path: Path, data: Path, gpus: Any, workers: int, pods: list[int]
) -> None:
    amounts = {"cpu": "16", "example.com/gpu": gpus}
    container = {"name": "ray", "image": "genmodels:test", "resources": {"requests": dict(amounts), "limits": amounts}}
    change_template(
        tmp_path, group={"groupName": "gpu-workers", "template": {"spec": {"containers": [container]}}}, at=1
    )
    template = Template(KubeOptions(template=tmp_path / "template.yaml"))
    body = template.fill("s3://b", "j", of(data, use_gpu=True).models[0], 1, workers, 0)
    api._create(body)
    _, *made = build_pods(body)
    resources = [pod["spec"]["containers"][0]["resources"] for pod in made]
    assert [each["limits"]["example.com/gpu"] for each in resources] == pods
    assert [each["requests"]["example.com/gpu"] for each in resources] == pods
    starts = [pod["spec"]["containers"][0]["args"][0] for pod in made]
    assert all(
        f"--num-cpus={count} " in start and f"--num-gpus={count} " in start
        for count, start in zip(pods, starts, strict=True)
    )


def test_a_hook_of_the_template_stays(tmp_path: Path, data: Path) -> None:
    own = {"preStop": {"sleep": {"seconds": 5}}}
    container = {"name": "ray", "image": "genmodels:test", "lifecycle": own}
    pod = {"spec": {"containers": [container], "terminationGracePeriodSeconds": 10}}
    change_template(tmp_path, group={"template": pod})
    body = Template(KubeOptions(template=tmp_path / "template.yaml")).fill("s3://b", "j", of(data).models[0], 1, 2, 0)
    head, worker, _ = build_pods(body)
    assert worker["spec"]["containers"][0]["lifecycle"] == own
    assert worker["spec"]["terminationGracePeriodSeconds"] == 10
    assert head["spec"]["terminationGracePeriodSeconds"] == 120


def test_a_class_for_each_priority(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(TEMPLATE))
    classes = [("high", 10), ("low", -5), ("normal", 0)]
    template = Template(KubeOptions(template=tmp_path / "t.yaml", queue="q", priorities=classes))
    classes = [template._queued(priority)["kueue.x-k8s.io/priority-class"] for priority in (-9, -5, -1, 0, 9, 10, 99)]
    assert classes == ["low", "low", "low", "normal", "normal", "high", "high"]


def test_a_cluster_that_is_there_takes_the_drivers(api: KubeApi, tmp_path: Path, data: Path) -> None:
    body = Template(KubeOptions(cluster="shared")).fill("s3://b", "j", of(data).models[0], 1, 2, 0)
    api._create(body)
    assert body["spec"]["clusterSelector"] == {"ray.io/cluster": "shared"}
    assert "--publish-on-worker" not in body["spec"]["entrypoint"], "its nodes are not known here"
    assert "rayClusterSpec" not in body["spec"]


def test_names_and_labels_hold_however_long() -> None:
    assert label("m" * 63) == "m" * 63
    assert label("m" * 64) != label("m" * 65)
    assert len(label("m" * 65)) == 63


# ---- settings


def options(*words: str) -> argparse.Namespace:
    return jobs_service._parser().parse_args(["--storage", "memory://", "--backend", "kuberay", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --kube-template-object, --kube-template or"),
        (["--kube-template=t", "--kube-template-object=o"], "a run has one template"),
        (["--kube-template=t", "--kube-queue=q", "--kube-cluster-selector=c"], "whole clusters"),
        (["--kube-template=t", "--kube-queue=q", "--max-cpus=3"], "only Kueue admits runs"),
        (["--kube-template=t", "--max-gpus=3"], "needs --max-cpus"),
        (["--kube-template=t", "--kube-priority=a=1"], "needs --kube-queue"),
        (["--kube-template=t", "--kube-queue=q", "--kube-priority=high"], "CLASS=NUMBER"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], message: str) -> None:
    with pytest.raises(GenmodelsError, match=message):
        KubeOptions.of(options(*words))


def test_the_backend_is_a_setting(api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"--kube-template={tmp_path / 'template.yaml'}", "--max-cpus=8", "--max-gpus=2"]
    backend = jobs_service._backend(options(*words), MemoryStorage())
    assert isinstance(backend, KubeRayBackend)
    assert backend.capacity() == Capacity(8, 2)
    monkeypatch.setenv("GENMODELS_BACKEND", "docker")
    with pytest.raises(GenmodelsError, match="GENMODELS_BACKEND must be ray-jobs or kuberay"):
        jobs_service._backend(jobs_service._parser().parse_args(["--storage", "memory://"]), MemoryStorage())


def test_settings_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NAMESPACE": "n", "TEMPLATE": "t", "QUEUE": "q", "PRIORITY": "low=-5,high=1"}.items():
        monkeypatch.setenv(f"GENMODELS_KUBE_{name}", value)
    parsed = KubeOptions.of(options())
    assert parsed == KubeOptions("n", Path("t"), None, "q", (("low", -5), ("high", 1)))
    monkeypatch.setenv("GENMODELS_KUBE_GIVE_WAY_SECONDS", "60")
    assert KubeOptions.of(options()).give_way_seconds == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("kind: Job", "must be one RayJob of ray.io/v1"),
        (yaml.safe_dump(TEMPLATE | {"spec": {}}), "lacks 'rayClusterSpec'"),
        (yaml.safe_dump(TEMPLATE).replace("workers", "hands"), "lacks 'workers'"),
        (yaml.safe_dump(TEMPLATE).replace("image:", "imagePullPolicy:"), "lacks 'image'"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(GenmodelsError, match=message):
        Template(KubeOptions(template=tmp_path / "t.yaml"))


def test_without_the_client_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(GenmodelsError, match=r"pip install 'genmodels\[kubernetes\]'"):
        kube_api.KubeApi()


def test_without_a_cluster_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(GenmodelsError, match="no Kubernetes cluster is configured"):
        kube_api.KubeApi()


def test_limits_are_the_operators(api: KubeApi, tmp_path: Path, data: Path) -> None:
    storage = MemoryStorage()
    platform = Platform(api, tmp_path, storage, a=[ends("stopped", saves=True), succeeds])
    platform.most = Capacity(1, 0)
    platform.restart()
    name = submit(storage, data, "few", "a", "b")
    platform.reconcile(2)
    assert state(storage, name, "b").state == "queued"
    platform.until("b", "succeeded", name)
