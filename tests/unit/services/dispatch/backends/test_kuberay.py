"""Test runs as RayJobs: a real dispatcher and the official client against a fake API server, KubeRay and Kueue."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import GenmodelsError
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.dispatch import attempt
from services.dispatch.backends import kube_api, kuberay
from services.dispatch.backends.base import LOST, PREEMPTED, REFUSED, Capacity, submission_id
from tests.support.fake_kubernetes import KubeApi
from tests.support.kubernetes_platform import Platform, api, change_template
from tests.support.paths import ROOT
from tests.support.ray_node import until
from tests.support.scripted_cluster import data, in_no_time, send_command, state, submit
from tests.support.scripted_drivers import dies, ends, obedient, succeeds
from tests.support.storages import MemoryStorage

__all__ = ["api", "data", "in_no_time"]

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
    until(lambda: platform.backend.capacity() is None, "the watch is lost", 10)
    platform.reconcile(5)
    assert (state(storage, name, "a").state, state(storage, other, "b").state) == ("running", "queued")
    until(lambda: platform.backend.api.watch.failures > 2, "it is opened again and again", 10)
    assert sum("watch rayjobs" in line for line in caplog.messages) == 1
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
    assert platform.poll(driver) is None
    platform.operator.clings = True
    api.status(name, **{"jobDeploymentStatus": "Failed"} | status)
    ended = status.get("jobStatus") in ("SUCCEEDED", "STOPPED", "FAILED") or status.get("rayClusterName") == ""
    polled = platform.poll(driver)
    if not ended:  # its driver may still run: first all its pods must go
        assert polled is None
        platform.operator.reconcile()
        assert api.pods
        assert platform.poll(driver) is None
        platform.operator.clings = False
        platform.operator.reconcile()
        polled = platform.poll(driver)
        assert name not in api.jobs
    assert polled == code
    assert reason in driver.reason
    assert platform.poll(platform.backend.find(job, "a", 1)) == (code if ended else LOST), "also for a later dispatcher"


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
    Run(storage, name, "a").send_command("stop", 1, "pod r-1-head is ending")  # by the hook
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
    assert platform.poll(driver) is None
    platform.operator.reconcile()
    assert platform.poll(driver) == PREEMPTED
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
    assert status.reason.startswith("Kubernetes refuses the RayJob: ")
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
    api.ill = [429, 503]
    platform = Platform(api, tmp_path, MemoryStorage())
    assert platform.backend.capacity() == Capacity(0, 0, unlimited=True)
    assert api.requests == [*["list rayjobs"] * 3, "watch rayjobs"]
    assert platform.backend.api.watch.failures == 0
    api.ill = [500] * 3
    platform.restart()
    until(lambda: platform.backend.capacity() is not None, "it is listed again after a failure", 10)
    assert api.requests.count("list rayjobs") == 7


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
