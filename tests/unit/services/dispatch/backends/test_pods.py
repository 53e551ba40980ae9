"""Test what is reported of pods that do not start."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from services.dispatch.backends.pods import Obstacle, find_obstacle
from tests.support.paths import ROOT

STATUSES: dict[str, Any] = yaml.safe_load((ROOT / "tests/k8s/fixtures/pod_statuses.yaml").read_text())
TAG = "the image registry.example/genmodels:2.60.0-0.1.O cannot be pulled "
GPU = "waits for nodes with room (Unschedulable: Insufficient nvidia.com/gpu, node(s) had untolerated taint(s))"


def pods(*names: str) -> list[Any]:
    return [{"metadata": {"name": name}, "status": STATUSES[name]} for name in names]


def quota(used: int, pod: str) -> dict[str, Any]:
    """Return the status of a RayCluster whose pods exceed a quota (calculateStatus of KubeRay's controller)."""
    message = (
        f'FailedCreateWorkerPod\npods "{pod}" is forbidden: exceeded quota: compute,'
        f" requested: limits.cpu=1, used: limits.cpu={used}, limited: limits.cpu=8"
    )
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": message}
    return {"conditions": [{"type": "HeadPodReady", "status": "True", "reason": "HeadPodRunningAndReady"}, failure]}


@pytest.mark.parametrize(
    ("name", "reason", "final"),
    [
        ("no such tag", TAG + "(ErrImagePull: failed to pull and unpack image", True),
        ("no such tag, later", TAG + "(ImagePullBackOff: Back-off", True),
        ("no access", "the image registry.example/genmodels:1 cannot be pulled (ErrImagePull: failed to auth", True),
        ("no valid name", "the image Registry/genmodels:1 cannot be pulled (InvalidImageName: ", True),
        ("no registry", "the image registry.example/genmodels:1 cannot be pulled (ErrImagePull: failed to do", False),
        ("no registry, later", "the image registry.example/genmodels:1 cannot be pulled (ImagePullBackOff", False),
        (
            "no secret",
            "the container ray-head does not start (CreateContainerConfigError: configmap",
            False,
        ),
        ("no GPU", GPU, False),
        ("no GPU, later", GPU, False),
        ("no nodes", "waits for nodes with room (Unschedulable: no nodes available to schedule pods)", False),
        ("gated", "waits to be scheduled (SchedulingGated: Scheduling is blocked", False),
    ],
)
def test_the_obstacle_of_a_pod(name: str, reason: str, final: bool) -> None:
    obstacle = find_obstacle(pods("starting", name), {})
    assert obstacle is not None
    assert obstacle.reason.startswith(reason)
    assert obstacle.final == final


def test_pods_that_start_have_none() -> None:
    assert find_obstacle(pods("starting"), {}) is None
    assert find_obstacle([{"metadata": {}}], {"conditions": None}) is None


def test_what_ends_the_run_comes_first() -> None:
    obstacle = find_obstacle(pods("no GPU", "no registry", "no such tag"), quota(8, "x"))
    assert obstacle is not None
    assert obstacle.final


def test_a_quota_names_itself_and_only_what_stays_the_same() -> None:
    """Each changed reason is a change of the run's state, so a message that KubeRay renews must stay the same."""
    reason = "a pod is refused (exceeded quota: compute, requested: limits.cpu=1, limited: limits.cpu=8)"
    assert find_obstacle([], quota(8, "r-1-worker-abcde")) == Obstacle(reason)
    assert find_obstacle([], quota(7, "r-1-worker-fghij")) == Obstacle(reason)


def test_a_message_is_shown_short_and_without_secrets() -> None:
    """Also of a container without state or name."""
    message = (
        "\x1b[2Jpull of https://me:pass@registry.example/v2?token=abc&n=1: Bearer xyz\x07 is denied " + "é" * 10**6
    )
    waiting = {"waiting": {"reason": "ErrImagePull", "message": message}}
    pod = {"status": {"containerStatuses": [{"name": "a", "state": None}, {"state": waiting}], "conditions": None}}
    obstacle = find_obstacle([{"metadata": {}, "status": None}, pod], {"conditions": None})
    assert obstacle is not None
    assert obstacle.final
    assert "https://registry.example/v2?token=***&n=1: Bearer *** is denied" in obstacle.reason.replace("***?", "***")
    assert len(obstacle.reason) < 500
    assert obstacle.reason.isprintable()
