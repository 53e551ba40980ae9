"""Test the template of RayJobs: as an object or a file, what is made of it, and the settings."""

from __future__ import annotations

import argparse
import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from genmodels.errors import GenmodelsError
from genmodels.runs.queue import read_queue
from genmodels.spec.sections import JobSpec
from services.dispatch.backends import kuberay
from services.dispatch.backends.base import Capacity, submission_id
from services.dispatch.backends.kuberay import KubeRayBackend
from services.dispatch.backends.rayjob import KubeOptions, Template, label
from services.jobs import app as jobs_service
from tests.support.fake_kuberay import refusal
from tests.support.fake_kubernetes import KubeApi
from tests.support.kuberay_pods import build_pods
from tests.support.kubernetes_platform import POD, TEMPLATE, Platform, api, change_template
from tests.support.paths import ROOT
from tests.support.ray_node import until
from tests.support.scripted_cluster import data, in_no_time, spec, state, submit
from tests.support.scripted_drivers import obedient
from tests.support.storages import MemoryStorage

__all__ = ["api", "data", "in_no_time"]

SHIPPED = sorted((ROOT / "k8s").rglob("rayjob.template.yaml"))

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


@pytest.mark.parametrize(
    ("limits", "memory"),
    [({"memory": "4Gi"}, 4 * 2**30), ({"memory": "6G"}, 6 * 10**9), ({"memory": 512}, 512), ({}, None)],
)
def test_the_memory_of_workers_is_the_limit_of_their_pod(
    api: KubeApi, limits: dict[str, Any], memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = copy.deepcopy(OBJECT)
    (group,) = template["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    group["template"]["spec"]["containers"][0]["resources"] = {"limits": limits}
    api._create(template)
    platform = Platform(api, "genmodels-template", MemoryStorage())
    platform.reconcile()
    expected = {} if memory is None else {"cpus": memory, "gpus": memory}
    assert read_queue(platform.storage).worker_memory == expected, "known before any run has started"
    group["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "9Gi"}}
    api.jobs["genmodels-template"]["spec"] = template["spec"]
    monkeypatch.setattr(kuberay, "TEMPLATE_SECONDS", 0.0)
    capacity = platform.backend.capacity()
    assert capacity is not None
    assert capacity.memory == 9 * 2**30, "an applied change is read without a start"


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
        waits = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_JOB_STOP_WAIT_TIME_S": hook[-1]}
        env = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        assert env.items() >= waits.items()
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


@pytest.mark.parametrize(("grace", "seconds"), [(0, "0"), (10, "5"), (30, "15"), (600, "580")])
def test_a_run_saves_also_in_a_short_grace_period(tmp_path: Path, data: Path, grace: int, seconds: str) -> None:
    container = {"name": "ray", "image": "genmodels:test"}
    pod = {"spec": {"containers": [container], "terminationGracePeriodSeconds": grace}}
    change_template(tmp_path, group={"template": pod})
    body = Template(KubeOptions(template=tmp_path / "template.yaml")).fill("s3://b", "j", of(data).models[0], 1, 2, 0)
    _, worker, _ = build_pods(body)
    ray = worker["spec"]["containers"][0]
    assert ray["lifecycle"]["preStop"]["exec"]["command"][-2:] == ["--seconds", seconds]


def test_a_field_without_a_value_is_not_set(tmp_path: Path, data: Path) -> None:
    """YAML reads `env:` with all its lines as comments so."""
    container = {"name": "ray", "image": "genmodels:test", "env": None, "lifecycle": None, "resources": None}
    pod = {"metadata": None, "spec": {"containers": [container], "terminationGracePeriodSeconds": None}}
    change_template(tmp_path, at=1, group={"template": pod, "rayStartParams": None})
    template = Template(KubeOptions(template=tmp_path / "template.yaml"))
    for use_gpu in (False, True):
        body = template.fill("s3://b", "j", of(data, use_gpu).models[0], 1, 2, 0)
        for each in build_pods(body):
            assert each["spec"]["terminationGracePeriodSeconds"] == 120
            assert each["spec"]["containers"][0]["lifecycle"]["preStop"]


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
    until(lambda: backend.capacity() == Capacity(8, 2), "it knows the cluster", 10)
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
