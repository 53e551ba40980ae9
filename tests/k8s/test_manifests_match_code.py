"""Test that commands, settings, ports, versions, rights and queues in the manifests match the code."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
import yaml

import genmodels
from genmodels.errors import GenmodelsError
from genmodels.metrics import DIRECTORY
from services.cluster.ray_start import local_environment
from services.dispatch.backends.base import submission_id
from services.gateway import deploy
from services.gateway.pool_config import VARIABLE, read_pools
from services.jobs import app
from services.node import exporter
from tests.support.manifests import (
    BUILDS,
    Manifest,
    build,
    cluster_of,
    config_map_of,
    head_of,
    only,
    pod_of,
    pods,
    problems,
    quotas_of,
    rayjob,
    settings,
    unrestricted,
)
from tests.support.paths import ROOT
from tests.support.ray_node import JoinedNode, RayHead, until
from tests.support.spec_files import read_spec

MODEL = read_spec(ROOT / "jobs" / "quickstart.yaml").models[0]
IMAGE = f"genmodels:{ray.__version__}-{genmodels.__version__}"

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
START_SECONDS = 600  # a node and a pod on it

every_build = pytest.mark.parametrize("name", BUILDS)


@every_build
def test_every_command_is_one_of_the_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the modules exist and accept the arguments."""
    manifests, modules = build(name), set()
    platform = settings(manifests, "genmodels-platform")
    for pod in pods(manifests):
        for container in pod.containers:
            if not container["image"].startswith("genmodels:") or "command" not in container:
                continue
            python, flag, module = container["command"]
            assert (python, flag) == ("python", "-m")
            values = [re.sub(r"\$\((\w+)\)", lambda match: platform[match[1]], arg) for arg in container["args"]]
            options = _parsed(module, values, monkeypatch)
            if "storage" in options:
                assert options.storage == platform["GENMODELS_STORAGE"]
            if "host" in options:
                assert options.host == "0.0.0.0"
                assert [port["containerPort"] for port in container["ports"]] == [options.port]
            modules.add(module)
    assert modules == {"services.jobs", "services.node.bootstrap", "services.node.exporter"}


@every_build
def test_every_setting_is_one_that_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = build(name)
    code = "".join(path.read_text() for folder in ("genmodels", "services") for path in (ROOT / folder).rglob("*.py"))
    ours = local_environment()
    for theirs in (
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_MODE",
    ):  # settings of one machine; KubeRay sets the others
        del ours[theirs]
    of_ray = settings(manifests, "genmodels-ray")
    assert of_ray == ours | {
        DIRECTORY: "/run/metrics",
        "GENMODELS_START_TIMEOUT_S": of_ray["GENMODELS_START_TIMEOUT_S"],
    }
    platform = settings(manifests, "genmodels-platform")
    mentioned = {name for name in [*of_ray, *platform] if name.startswith("GENMODELS_")}
    arguments = [arg for pod in pods(manifests) for c in pod.containers for arg in c.get("args", ())]
    for name in mentioned:
        assert f'"{name}"' in code or f"--storage=$({name})" in arguments
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in [name for name in platform if name.startswith("AWS_")]:
        monkeypatch.setenv(name, platform[name])
    client = boto3.session.Session(aws_access_key_id="a", aws_secret_access_key="b").client("s3")
    assert client.meta.endpoint_url == platform.get("AWS_ENDPOINT_URL", client.meta.endpoint_url)
    assert ".amazonaws.com" in client.meta.endpoint_url or "AWS_ENDPOINT_URL" in platform
    assert client.meta.region_name == platform["AWS_DEFAULT_REGION"]
    for pod in pods(manifests):
        for container in pod.containers:
            if config_map_of(container, "genmodels-platform"):
                (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "s3"]
                assert platform["AWS_SHARED_CREDENTIALS_FILE"] == f"{mount}/credentials"


@every_build
def test_the_serve_config_is_the_one_of_the_code(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Ray Serve defines settings in ways that pydantic warns of
        from ray.serve import Application
        from ray.serve.schema import ServeDeploySchema

        from services.gateway import app

    manifests = build(name)
    service = only(manifests, "RayService")
    monkeypatch.setenv("GENMODELS_STORAGE", storage := settings(manifests, "genmodels-platform")["GENMODELS_STORAGE"])
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    declared = deploy.declaration(storage, "0.0.0.0", 8000, True, read_pools())
    (application,), expected = config["applications"], declared["applications"][0]
    (override,) = application.pop("deployments")
    assert application == {
        "name": expected["name"],
        "route_prefix": expected["route_prefix"],
        "import_path": f"{app.application.__module__}:{app.application.__name__}",
        "args": {"auth": True},  # the pods' environment says the storage and the pools
    }
    assert config["logging_config"] == declared["logging_config"]
    assert config["http_options"] == declared["http_options"] | {"host": "0.0.0.0"}
    monkeypatch.setenv(VARIABLE, str(_pools_file(manifests, tmp_path)))
    assert isinstance(app.application(application["args"]), Application)
    monkeypatch.delenv("GENMODELS_STORAGE")
    with pytest.raises(GenmodelsError, match="GENMODELS_STORAGE is not set"):
        app.application(application["args"])
    gateway: Any = app.Gateway  # a Serve deployment; mypy sees the class
    assert override["name"] == gateway.name
    # One gateway and one host fit a worker, and neither fits the head.
    (hosts,) = cluster_of(service)["workerGroupSpecs"]
    cpus = float(hosts["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    needed = [override["ray_actor_options"]["num_cpus"], *(pool.cpus for pool in read_pools().pools)]
    assert min(needed) > 0
    assert sum(needed) <= cpus
    assert head_of(service)["rayStartParams"]["num-cpus"] == "0"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > schema.http_options.request_timeout_s


@every_build
def test_endpoint_and_job_service_read_the_same_pools(name: str) -> None:
    manifests, readers = build(name), []
    for pod in pods(manifests):
        for container in pod.containers:
            variables = {variable["name"]: variable.get("value") for variable in container.get("env", ())}
            if path := variables.get(VARIABLE):
                readers.append(pod.of)
                mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
                volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
                config_map = volumes[mounts[os.path.dirname(path)]]["configMap"]["name"]
                assert settings(manifests, "genmodels-pools").keys() == {os.path.basename(path)}
                assert config_map.startswith("genmodels-pools-"), "a changed file is a new name, which rolls out"
                assert only(manifests, "ConfigMap", config_map)
    assert readers == ["Deployment/genmodels-jobs", "RayService/genmodels/head", "RayService/genmodels/hosts"]


@every_build
def test_a_drain_leaves_time_for_another_pod_to_start(name: str, tmp_path: Path) -> None:
    """Serve stops a replica of a draining node graceful_shutdown_timeout_s before the deadline, moved or not."""
    from ray._private import ray_constants

    manifests = build(name)
    service = only(manifests, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    pools = read_pools(_pools_file(manifests, tmp_path)).pools
    (hosts,) = cluster_of(service)["workerGroupSpecs"]
    pod = hosts["template"]["spec"]
    drain = float(_environment(pod["containers"][0])[DRAIN])
    assert hasattr(ray_constants, DRAIN), "Ray reads it"
    (gateway,) = config["applications"][0]["deployments"]
    for graceful in (gateway["graceful_shutdown_timeout_s"], *(pool.stop_seconds for pool in pools)):
        assert config["http_options"]["request_timeout_s"] < graceful
        assert drain - graceful >= START_SECONDS
    assert pod["terminationGracePeriodSeconds"] > drain
    assert "lifecycle" not in pod["containers"][0], "Ray would be told only when the hook has ended"


@pytest.mark.ray
@pytest.mark.long
def test_a_serving_pod_that_is_deleted_drains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to a real `ray start` with the manifest's setting: it drains, and ends before the deadline."""
    monkeypatch.setenv(DRAIN, _environment(pod_of("RayService/genmodels/hosts").spec["containers"][0])[DRAIN])
    with RayHead(tmp_path / "head.log", 0) as head, JoinedNode(tmp_path / "worker.log", head, 2) as node:
        until(lambda: (there := head.backend.capacity()) and there.cpus == 2, "the worker joins")
        children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        until(lambda: (there := head.backend.capacity()) and there.cpus == 0, "the idle worker leaves")
        until(lambda: node.process.poll() is not None, "its processes end")
    assert "Local node finished draining" in (tmp_path / "worker.log").read_text()


@every_build
def test_versions_images_and_names(name: str) -> None:
    manifests = build(name)
    for pod in pods(manifests):
        images = {container["image"] for container in pod.containers}
        if pod.of.startswith("StatefulSet/"):
            assert all(re.fullmatch(r"[a-z/]+:[\w.-]*\d[\w.-]*", image) for image in images)
        else:
            name = "genmodels-cuda:" if pod.of.endswith("/gpu-workers") else "genmodels:"
            assert images == {IMAGE.replace("genmodels:", name)}, pod.of
    run = rayjob(manifests)
    for manifest in (only(manifests, "RayService"), run):
        assert cluster_of(manifest)["rayVersion"] == ray.__version__
        assert cluster_of(manifest)["authOptions"]["mode"] == "token"
        assert len(manifest["metadata"]["name"]) <= 47
    assert len(submission_id("a", "b", 999_999)) <= 47
    assert run["spec"]["backoffLimit"] == 0
    assert run["spec"]["submissionMode"] == "HTTPMode"
    assert run["spec"]["shutdownAfterJobFinishes"] is True


def test_the_gpu_template_is_the_other_with_a_group_more() -> None:
    base, gpu = rayjob(build("base")), rayjob(build("overlays/gpu"))
    workers, more = cluster_of(gpu)["workerGroupSpecs"]
    assert (workers["groupName"], more["groupName"]) == ("workers", "gpu-workers")
    assert more["template"]["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    resources = more["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    cluster_of(gpu)["workerGroupSpecs"].remove(more)
    assert gpu == base


@pytest.mark.parametrize("use_gpu", [False, True])
def test_what_the_dispatcher_makes_of_the_template_fits_the_schema(use_gpu: bool) -> None:
    from services.dispatch.backends.rayjob import KubeOptions, Template

    options = KubeOptions(template_object="t", queue="genmodels", priorities=[("genmodels-normal", 0)])
    template = Template(options)
    template.use(rayjob(build("overlays/gpu")))
    spec = MODEL.model_copy(update={"scaling": MODEL.scaling.model_copy(update={"use_gpu": use_gpu})})
    made = template.fill("s3://bucket/a", "job-1", spec, 2, 3, 0)
    assert not problems(made)
    (group,) = cluster_of(made)["workerGroupSpecs"]
    assert group["groupName"] == ("gpu-workers" if use_gpu else "workers")
    assert (group["minReplicas"], group["maxReplicas"]) == (3, 3)
    assert made["spec"]["suspend"] is True
    for pod in pods([made]):
        assert pod.labels["app.kubernetes.io/component"] == "training"  # what policies and monitors select
        assert not unrestricted(pod.spec)


def test_the_job_service_has_the_rights_that_it_uses() -> None:
    code = (ROOT / "services/dispatch/backends/kube_api.py").read_text()
    used = {(what, verb) for verb, what in re.findall(r"\b([a-z]+)_namespaced_(\w+?)(?:_status)?\b", code)}
    used |= {("custom_object", "watch")} if "watch=True" in code else set()
    rules = only(build("base"), "Role")["rules"]
    granted = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    names = {"custom_object": "rayjobs", "pod": "pods"}
    assert {(names[what], verb) for what, verb in used} == granted
    assert [rule["apiGroups"] for rule in rules] == [["ray.io"], [""]]
    assert only(build("base"), "RoleBinding")["roleRef"]["kind"] == "Role"


def test_the_image_has_the_client_of_kubernetes() -> None:
    dockerfile = ROOT / "docker" / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("docker/Dockerfile is not in this checkout")
    assert "kubernetes" in dockerfile.read_text()


@every_build
def test_queues_and_classes_are_there(name: str) -> None:
    manifests = build(name)
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    given = [arg.removeprefix("--").split("=") for arg in container["args"] if arg.startswith("--kube-")]
    queues = [value for flag, value, *_ in given if flag == "kube-queue"]
    classes = [value for flag, value, *_ in given if flag == "kube-priority"]
    assert queues == [m["metadata"]["name"] for m in manifests if m["kind"] == "LocalQueue"]
    values = {m["metadata"]["name"]: m["value"] for m in manifests if m["kind"] == "WorkloadPriorityClass"}
    assert classes == sorted(values, key=lambda name: values[name])
    (template,) = [value for flag, value, *_ in given if flag == "kube-template-object"]
    assert template == rayjob(manifests)["metadata"]["name"]
    assert rayjob(manifests)["spec"]["suspend"] is True, "the operator makes a cluster of it"
    queue = next((m for m in manifests if m["kind"] == "ClusterQueue"), None)
    if queue:  # Kueue admits no workload that requests a resource without a quota
        (group,) = queue["spec"]["resourceGroups"]
        requested = {
            resource
            for pod in pods([rayjob(manifests)])
            for c in pod.containers
            for resource in c["resources"]["requests"]
        }
        assert requested <= set(group["coveredResources"])
        assert group["coveredResources"] == [quota["name"] for quota in quotas_of(queue)]


def test_ports_are_those_of_the_code() -> None:
    ports = {
        port["name"]: port["containerPort"]
        for pod in pods(build("base"))
        for c in pod.containers
        for port in c.get("ports", ())
    }
    assert (ports["exporter"], ports["http"], ports["serve"]) == (exporter.PORT, app.PORT, 8000)
    assert (ports["gcs-server"], ports["dashboard"], ports["metrics"], ports["redis"]) == (6379, 8265, 8080, 6379)


def _parsed(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return the arguments that a module's `main` parses from a command line."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(parse(parser, arguments))

    is_package = bool(importlib.util.find_spec(module).submodule_search_locations)
    main = importlib.import_module(f"{module}.__main__" if is_package else module).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            main()
    parsed_arguments: argparse.Namespace = parsed.value.args[0]
    return parsed_arguments


def _environment(container: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container.get("env", ())}


def _pools_file(manifests: list[Manifest], folder: Path) -> Path:
    """Write the file of the pools that the pods have."""
    (folder / "pools.yaml").write_text(settings(manifests, "genmodels-pools")["pools.yaml"])
    return folder / "pools.yaml"
