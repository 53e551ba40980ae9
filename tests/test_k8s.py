"""The manifests build, are what Kubernetes and its operators take, and say what the code does."""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
import yaml
from manifests import BUILDS, K8S, ROOT, Manifest, PodTemplate, build, only, pods, problems, rayjob, unrestricted
from ray_node import OTHER, JoinedNode, RayHead, until
from services.rayjob import KubeOptions, Template

import genmodels
from genmodels.spec import read_spec
from services import deploy, exporter, jobs
from services.backends import submission_id
from services.local import ray_environment

MODEL = read_spec(ROOT / "jobs" / "quickstart.yaml").models[0]
IMAGE = f"genmodels:{ray.__version__}-{genmodels.__version__}"
TOOLS = Path(sys.prefix) / "k8s-tools" / "bin"  # `make test-k8s` makes it
STRICT = ROOT.parent / "shared" / "k8s"
RULES = ROOT / "docker" / "prometheus" / "rules"

every_build = pytest.mark.parametrize("name", BUILDS)


@every_build
def test_it_builds_and_fits_the_schemas(name: str) -> None:
    manifests = build(name)
    assert {problem for manifest in manifests for problem in problems(manifest)} == set()
    ids = [(m["apiVersion"], m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(ids) == len(set(ids))
    cluster_wide = {"Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"}
    namespaces = {m["metadata"].get("namespace") for m in manifests if m["kind"] not in cluster_wide}
    assert namespaces == {"genmodels"}
    assert not [m for m in manifests if m["kind"] == "Secret"]


BROKEN: dict[str, tuple[str, Callable[[Manifest], Any]]] = {
    "a misspelt field": ("Deployment", lambda m: m["spec"].update(replica=2)),
    "a field in the wrong place": ("Deployment", lambda m: m["spec"].update(containers=[])),
    "a string for a number": ("Deployment", lambda m: m["spec"].update(replicas="2")),
    "no selector": ("Deployment", lambda m: m["spec"].pop("selector")),
    "a unit that there is not": ("Deployment", lambda m: _resources(m).update(memory="4GB")),
    "null": ("Service", lambda m: m["spec"].update(selector=None)),
    "a port without a number": ("Service", lambda m: m["spec"]["ports"][0].pop("port")),
    "a misspelt field of KubeRay's": ("RayService", lambda m: m["spec"].update(serveConfig="")),
    "a word that KubeRay does not know": ("RayService", lambda m: _cluster(m)["authOptions"].update(mode="tokens")),
    "a number where Ray takes strings": ("RayService", lambda m: _head(m)["rayStartParams"].update({"num-cpus": 0})),
    "a pod in a Ray cluster, misspelt": ("RayService", lambda m: _head(m)["template"]["spec"].update(tolerance=[])),
    "a container without a name": ("RayJob", lambda m: _head(m)["template"]["spec"]["containers"][0].pop("name")),
    "a negative deletion delay": ("RayService", lambda m: m["spec"].update(rayClusterDeletionDelaySeconds=-1)),
    "a quota that is no quantity": ("ClusterQueue", lambda m: _quotas(m)[0].update(nominalQuota="many")),
    "a preemption that there is not": (
        "ClusterQueue",
        lambda m: m["spec"]["preemption"].update(withinClusterQueue="A"),
    ),
    "an interval that is none": ("PodMonitor", lambda m: m["spec"]["podMetricsEndpoints"][0].update(interval="soon")),
    "a rule that is no rule": ("PrometheusRule", lambda m: m["spec"]["groups"][0].update(rules=["up == 0"])),
    "a kind that there is not": ("Role", lambda m: m.update(kind="Rule")),
    "a version that there is not": ("RayService", lambda m: m.update(apiVersion="ray.io/v2")),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(what: str) -> None:
    kind, spoil = BROKEN[what]
    manifest = next(m for m in build("overlays/production") if m["kind"] == kind)
    assert not problems(manifest)
    spoil(manifest)
    assert problems(manifest)


def test_a_kustomization_that_names_what_is_not_there_is_found(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    (tmp_path / "k8s" / "base" / "role.jobs.yaml").unlink()
    with pytest.raises(AssertionError, match=r"role\.jobs\.yaml"):
        build(str(tmp_path / "k8s" / "overlays" / "production"))


@every_build
def test_pods_are_restricted(name: str) -> None:
    manifests = build(name)
    labels = only(manifests, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(manifests):
        assert not unrestricted(pod.spec), pod.of
        is_jobs = pod.of == "Deployment/genmodels-jobs"
        assert pod.spec["automountServiceAccountToken"] is is_jobs, f"{pod.of}: who needs none gets none"
        for container in pod.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"], pod.of
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests["memory"] == limits["memory"], pod.of
            assert {"cpu"} <= requests.keys() & limits.keys(), pod.of
            assert not [env for env in container.get("env", ()) if "secretKeyRef" in env.get("valueFrom", {})]
    autoscaler = _cluster(only(manifests, "RayService")).get("autoscalerOptions")
    if autoscaler:
        beside = _head(only(manifests, "RayService"))["template"]["spec"]
        whole = {**beside, "containers": [{"name": "autoscaler", "securityContext": autoscaler["securityContext"]}]}
        assert not unrestricted(whole)


LOOSE: dict[str, Callable[[Manifest], Any]] = {
    "root": lambda spec: spec["securityContext"].update(runAsUser=0),
    "whoever the image says": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
    "any system call": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "sudo": lambda spec: spec["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
    "a capability": lambda spec: spec["containers"][0]["securityContext"]["capabilities"].update(add=["NET_RAW"]),
    "a sidecar without limits": lambda spec: spec["initContainers"][0].pop("securityContext"),
    "the node's network": lambda spec: spec.update(hostNetwork=True),
    "the node's disk": lambda spec: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "the node's port": lambda spec: spec["containers"][0]["ports"][0].update(hostPort=80),
}


@pytest.mark.parametrize("what", LOOSE)
def test_what_is_unrestricted_is_found(what: str) -> None:
    spec = copy.deepcopy(_pod("RayService/genmodels/head").spec)
    LOOSE[what](spec)
    assert unrestricted(spec)


@every_build
def test_every_command_is_one_of_the_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules are there, and take the arguments."""
    manifests, seen = build(name), set()
    settings = only(manifests, "ConfigMap", "genmodels-platform")["data"]
    for pod in pods(manifests):
        for container in pod.containers:
            if not container["image"].startswith("genmodels:") or "command" not in container:
                continue
            python, flag, module = container["command"]
            assert (python, flag) == ("python", "-m")
            values = [re.sub(r"\$\((\w+)\)", lambda found: settings[found[1]], arg) for arg in container["args"]]
            options = _parsed(module, values, monkeypatch)
            if "storage" in options:
                assert options.storage == settings["GENMODELS_STORAGE"]
            if "host" in options:
                assert options.host == "0.0.0.0"
                assert [port["containerPort"] for port in container["ports"]] == [options.port]
            seen.add(module)
    assert seen == {"services.jobs", "services.bootstrap", "services.exporter"}


@every_build
def test_every_setting_is_one_that_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = build(name)
    code = "".join(path.read_text() for folder in ("genmodels", "services") for path in (ROOT / folder).rglob("*.py"))
    ours = ray_environment()
    for theirs in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):  # one machine's; KubeRay's
        del ours[theirs]
    of_ray = only(manifests, "ConfigMap", "genmodels-ray")["data"]
    assert of_ray == ours | {
        exporter.DIRECTORY: "/run/metrics",
        "GENMODELS_START_TIMEOUT_S": of_ray["GENMODELS_START_TIMEOUT_S"],
    }
    platform = only(manifests, "ConfigMap", "genmodels-platform")["data"]
    mentioned = {name for name in [*of_ray, *platform] if name.startswith("GENMODELS_")}
    arguments = [arg for pod in pods(manifests) for c in pod.containers for arg in c.get("args", ())]
    for name in mentioned:
        assert f'"{name}"' in code or f"--storage=$({name})" in arguments
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in [name for name in platform if name.startswith("AWS_")]:
        monkeypatch.setenv(name, platform[name])
    client = boto3.session.Session(aws_access_key_id="a", aws_secret_access_key="b").client("s3")
    assert client.meta.endpoint_url == platform["AWS_ENDPOINT_URL"]
    assert client.meta.region_name == platform["AWS_DEFAULT_REGION"]
    for pod in pods(manifests):
        for container in pod.containers:
            if {"configMapRef": {"name": "genmodels-platform"}} in container.get("envFrom", ()):
                (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "s3"]
                assert platform["AWS_SHARED_CREDENTIALS_FILE"] == f"{mount}/credentials"


@every_build
def test_the_serve_config_is_the_one_of_the_code(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Ray Serve defines settings in ways that pydantic warns of
        from ray.serve.schema import ServeDeploySchema

        from services import gateway

    manifests = build(name)
    service = only(manifests, "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    storage = only(manifests, "ConfigMap", "genmodels-platform")["data"]["GENMODELS_STORAGE"]
    values = {"storage_url": storage, "host": "0.0.0.0", "port": 8000, "auth": True}
    declared = deploy.declaration(**{key: values[key] for key in inspect.signature(deploy.declaration).parameters})
    (application,), (expected,) = config["applications"], declared["applications"]
    overrides = application.pop("deployments")
    assert application == expected
    assert config["logging_config"] == declared["logging_config"]
    assert config["http_options"] == declared["http_options"] | {"host": "0.0.0.0"}
    module, _, function = application["import_path"].partition(":")
    built = getattr(importlib.import_module(module), function)(application["args"])
    assert isinstance(built, gateway.Application)
    assert [override["name"] for override in overrides] == [gateway.Gateway.name, gateway.POOL]
    # One gateway and one host fit a worker, and neither fits the head.
    (hosts,) = _cluster(service)["workerGroupSpecs"]
    cpus = float(hosts["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    needed = [override["ray_actor_options"]["num_cpus"] for override in overrides]
    assert min(needed) > 0
    assert sum(needed) <= cpus
    assert _head(service)["rayStartParams"]["num-cpus"] == "0"
    # A request ends, then its replica, then the wait before its pod's end, then the pod, then its cluster.
    sleep = int(re.findall(r"^sleep (\d+)", _drain(hosts["template"]["spec"]), re.MULTILINE)[0])
    replica = {override["graceful_shutdown_timeout_s"] for override in overrides}
    grace = hosts["template"]["spec"]["terminationGracePeriodSeconds"]
    waits = [
        schema.http_options.request_timeout_s,
        *replica,
        sleep,
        grace,
        service["spec"]["rayClusterDeletionDelaySeconds"],
    ]
    assert waits == sorted(set(waits))


def test_drain_uses_options_that_ray_has() -> None:
    from ray.scripts.scripts import cli

    script = _drain(_pod("RayService/genmodels/hosts").spec)
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0
    commands = re.findall(r"ray (list|drain-node)((?:[^|&]|\\\n)*)", script)
    assert [command for command, _ in commands] == ["list", "drain-node"]
    for command, rest in commands:
        known = {option for parameter in cli.commands[command].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


@pytest.mark.long
def test_a_serving_pod_that_is_deleted_drains(tmp_path: Path) -> None:
    """The preStop of the manifest, against a real Ray, without its wait."""
    script = _drain(_pod("RayService/genmodels/hosts").spec).replace("sleep 340", "echo waits")
    with RayHead(tmp_path / "head.log", 0) as head, JoinedNode(tmp_path / "worker.log", head, 2):
        until(lambda: (there := head.backend.capacity()) and there.cpus == 2, "the worker joins")
        environment = {**os.environ, "RAY_ADDRESS": head.gcs, "POD_IP": OTHER}
        done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
        assert done.stdout.endswith("waits\n"), done.stderr
        until(lambda: (there := head.backend.capacity()) and there.cpus == 0, "the idle worker leaves")


@every_build
def test_versions_images_and_names(name: str) -> None:
    manifests = build(name)
    for pod in pods(manifests):
        images = {container["image"] for container in pod.containers}
        if pod.of.startswith("StatefulSet/"):
            assert all(re.fullmatch(r"[a-z/]+:[\w.-]*\d[\w.-]*", image) for image in images)
        else:
            cuda = {f"{IMAGE}-cuda"} if pod.of.endswith("/gpu-workers") else {IMAGE}
            assert images == cuda, pod.of
    run = rayjob(manifests)
    for manifest in (only(manifests, "RayService"), run):
        assert _cluster(manifest)["rayVersion"] == ray.__version__
        assert _cluster(manifest)["authOptions"]["mode"] == "token"
        assert len(manifest["metadata"]["name"]) <= 47
    assert re.fullmatch(r"r-[0-9a-f]{12}-a1", run["metadata"]["name"])
    assert len(submission_id("a", "b", 999_999)) <= 47
    assert run["spec"]["backoffLimit"] == 0
    assert run["spec"]["submissionMode"] == "HTTPMode"
    assert run["spec"]["shutdownAfterJobFinishes"] is True


def test_the_gpu_template_is_the_other_with_a_group_more() -> None:
    base, gpu = rayjob(build("base")), rayjob(build("overlays/gpu"))
    workers, more = _cluster(gpu)["workerGroupSpecs"]
    assert (workers["groupName"], more["groupName"]) == ("workers", "gpu-workers")
    assert more["template"]["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    resources = more["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["nvidia.com/gpu"] == "1"
    _cluster(gpu)["workerGroupSpecs"].remove(more)
    assert gpu == base


@pytest.mark.parametrize("use_gpu", [False, True])
def test_what_the_dispatcher_makes_of_the_template_fits_the_schema(use_gpu: bool) -> None:
    template = K8S / "components" / "gpu" / "rayjob.template.yaml"
    options = KubeOptions(template=template, queue="genmodels", priorities=[("genmodels-normal", 0)])
    spec = MODEL.model_copy(update={"scaling": MODEL.scaling.model_copy(update={"use_gpu": use_gpu})})
    made = Template(options).fill("s3://bucket/a", "job-1", spec, 2, 3, 0)
    assert not problems(made)
    (group,) = _cluster(made)["workerGroupSpecs"]
    assert group["groupName"] == ("gpu-workers" if use_gpu else "workers")
    assert (group["minReplicas"], group["maxReplicas"]) == (3, 3)
    assert made["spec"]["suspend"] is True
    for pod in pods([made]):
        assert pod.labels["app.kubernetes.io/component"] == "training"  # what policies and monitors select
        assert not unrestricted(pod.spec)


def test_the_job_service_has_the_rights_that_it_uses() -> None:
    code = (ROOT / "services" / "kubeapi.py").read_text()
    used = {(what, verb) for verb, what in re.findall(r"\b([a-z]+)_namespaced_(\w+?)(?:_status)?\b", code)}
    rules = only(build("base"), "Role")["rules"]
    granted = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    names = {"custom_object": "rayjobs", "pod": "pods"}
    assert {(names[what], verb) for what, verb in used} == granted
    assert rules[0]["apiGroups"] == ["ray.io"]
    assert only(build("base"), "RoleBinding")["roleRef"]["kind"] == "Role"


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
    (path,) = [value for flag, value, *_ in given if flag == "kube-template"]
    (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "rayjob"]
    (config,) = [m for m in manifests if m["metadata"]["name"].startswith("genmodels-rayjob-")]
    assert [f"{mount}/{key}" for key in config["data"]] == [path]
    queue = next((m for m in manifests if m["kind"] == "ClusterQueue"), None)
    if queue:  # Kueue admits nothing that asks for a resource it has no quota of
        (group,) = queue["spec"]["resourceGroups"]
        asked = {
            resource
            for pod in pods([rayjob(manifests)])
            for c in pod.containers
            for resource in c["resources"]["requests"]
        }
        assert asked <= set(group["coveredResources"])
        assert group["coveredResources"] == [quota["name"] for quota in _quotas(queue)]


@every_build
def test_only_the_gateway_is_open(name: str) -> None:
    manifests = build(name)
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    open_to_all = [name for name, spec in policies.items() for rule in spec.get("ingress", ()) if not rule.get("from")]
    assert open_to_all == ["gateway"]
    gate = policies["gateway"]
    assert gate["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    assert [pod.of for pod in pods(manifests) if _selects(gate["podSelector"], pod)] == ["RayService/genmodels/hosts"]
    for spec in policies.values():  # none is for pods that there are not
        assert _is_for_ray(spec) or any(_selects(spec["podSelector"], pod) for pod in pods(manifests))


def test_ports_are_those_of_the_code() -> None:
    ports = {
        port["name"]: port["containerPort"]
        for pod in pods(build("base"))
        for c in pod.containers
        for port in c.get("ports", ())
    }
    assert (ports["exporter"], ports["http"], ports["serve"]) == (exporter.PORT, jobs.PORT, 8000)
    assert (ports["gcs-server"], ports["dashboard"], ports["metrics"], ports["redis"]) == (6379, 8265, 8080, 6379)


def test_what_is_scraped_is_there_and_may_be_reached() -> None:
    manifests = build("overlays/monitoring")
    reachable = {port["port"] for port in only(manifests, "NetworkPolicy", "monitoring")["spec"]["ingress"][0]["ports"]}
    scraped: dict[str, set[str]] = {}
    for monitor in [m for m in manifests if m["kind"] == "PodMonitor"]:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        job = endpoint["relabelings"][0]["replacement"]
        for pod in pods(manifests):
            if _selects(monitor["spec"]["selector"], pod):
                ports = [
                    port for c in pod.containers for port in c.get("ports", ()) if port["name"] == endpoint["port"]
                ]
                assert [port["containerPort"] in reachable for port in ports] == [True], (pod.of, endpoint)
                scraped.setdefault(job, set()).add(pod.of)
    rays = {pod.of for pod in pods(manifests) if pod.of.startswith("Ray")}
    assert scraped == {"nodes": rays, "ray": rays, "jobs": {"Deployment/genmodels-jobs"}}


def test_exporters_see_the_processes_whose_metrics_they_read() -> None:
    for pod in pods(build("base")):
        if not pod.of.startswith("Ray"):
            continue
        assert pod.spec["shareProcessNamespace"] is True
        (sidecar,) = pod.spec["initContainers"]
        assert sidecar["restartPolicy"] == "Always"
        for container in (sidecar, pod.spec["containers"][0]):
            assert {"name": "metrics", "mountPath": "/run/metrics"} in container["volumeMounts"]
            assert {"configMapRef": {"name": "genmodels-ray"}} in container["envFrom"]


def test_rules_are_those_of_compose() -> None:
    if not RULES.exists():
        pytest.skip("docker/prometheus/rules is not in this checkout")
    folder = K8S / "components" / "monitoring"
    manifest = runpy.run_path(str(folder / "rules.py"))["manifest"]
    made = {f"prometheusrule.{path.stem}.yaml": manifest(path) for path in RULES.glob("*.yml")}
    assert made == {path.name: path.read_text() for path in folder.glob("prometheusrule.*")}, "run rules.py"


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: Debian's package prometheus has it")
def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    for rule in [m for m in build("overlays/monitoring") if m["kind"] == "PrometheusRule"]:
        file = tmp_path / f"{rule['metadata']['name']}.yml"
        file.write_text(yaml.safe_dump(rule["spec"]))
        done = subprocess.run(["promtool", "check", "rules", "--lint-fatal", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not (TOOLS / "checkov").exists(), reason="no checkov: `make test-k8s` sets it up")
def test_the_security_linter_passes(tmp_path: Path) -> None:
    """With pods of Ray's resources written out as such: it knows none of their kinds."""
    manifests = build("overlays/production") + [
        m for m in build("overlays/dev") if m["metadata"]["name"] == "genmodels-store"
    ]
    written = [m for m in manifests if m["apiVersion"] != "ray.io/v1"]
    for pod in pods(manifests):
        if pod.of.startswith("Ray"):
            meta = {"name": pod.of.lower().replace("/", "-"), "namespace": "genmodels", **pod.template["metadata"]}
            written.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod.spec})
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(written))
    command = [str(TOOLS / "checkov"), "-f", str(tmp_path / "all.yaml"), "--config-file", str(K8S / "checkov.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Passed checks: [1-9]\d\d", done.stdout), done.stdout


@pytest.mark.skipif(
    not STRICT.exists() or not TOOLS.exists(), reason="no ../shared/k8s, or `make test-k8s` not run yet"
)
@every_build
def test_the_strict_validator_passes(name: str, tmp_path: Path) -> None:
    """All that an API server and the operators refuse in code, and references between documents."""
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(build(name)))
    external = [f"Secret/{secret}" for secret in _secrets(build(name))] + ["ConfigMap/kube-root-ca.crt"]
    command = [str(TOOLS / "python"), str(STRICT / "validate_manifests.py"), str(tmp_path / "all.yaml")]
    options = ["--schemas", str(STRICT / "schemas"), "--k8s", "1.33", "--strict-refs", "--warnings-as-errors"]
    known = [part for reference in external for part in ("--external", reference)]
    done = subprocess.run([*command, *options, *known], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guide_names_what_there_is() -> None:
    guide = (K8S / "README.md").read_text()
    assert all((ROOT / path.rstrip(".,")).exists() for path in re.findall(r"\bk8s/[\w./-]+", guide))
    for secret in set().union(*(_secrets(build(name)) for name in BUILDS)):
        assert f"kubectl -n genmodels create secret generic {secret} " in guide
    assert IMAGE in guide


def test_the_guide_counts_right() -> None:
    """Requests of pods, and how many of them a node has room for."""
    size = {
        f"{name} {pod.of}": _size(pod.spec)
        for name in ("base", "overlays/dev", "overlays/gpu")
        for pod in pods(build(name))
    }
    service = only(build("base"), "RayService")
    autoscaler = _requests(_cluster(service)["autoscalerOptions"])
    (hosts,) = _cluster(service)["workerGroupSpecs"]
    head, host = size["base RayService/genmodels/head"], size["base RayService/genmodels/hosts"]
    rest = [*[size["base Deployment/genmodels-jobs"]] * 2, size["base StatefulSet/genmodels-redis"], head, autoscaler]
    dev = [requests for of, requests in size.items() if of.startswith("overlays/dev") and "RayJob" not in of]
    rows = {
        "platform, at rest (2 hosts)": _sum([*rest, *[host] * hosts["minReplicas"]]),
        "platform, at most (6 hosts); twice": _sum([*rest, *[host] * hosts["maxReplicas"]]),
        "platform, overlay dev": _sum(dev),
        "a run: its head": size["base RayJob/r-000000000000-a1/head"],
        "a run: each worker": size["base RayJob/r-000000000000-a1/workers"],
        "a run on GPUs: each worker": size["overlays/gpu RayJob/r-000000000000-a1/gpu-workers"],
    }
    guide = (K8S / "README.md").read_text()
    for row, (cpu, memory) in rows.items():
        assert re.search(rf"\| {re.escape(row)}.*\| {cpu:g} \| {memory:g} GiB \|", guide), (row, cpu, memory)
    kinds = [host, rows["a run: each worker"], rows["a run on GPUs: each worker"]]
    for node, *fit in re.findall(r"^\| (\d+ CPU, \d+ GiB) \| (\d+) \| (\d+) \| (\d+) \|$", guide, re.MULTILINE):
        cpus, memory = (int(number) for number in re.findall(r"\d+", node))
        room = [int(min((cpus - 0.2) / kind[0], memory * 0.88 / kind[1])) for kind in kinds]
        assert [int(number) for number in fit] == room, node


def _size(spec: Manifest) -> tuple[float, float]:
    return _sum([_requests(container) for container in [*_sidecars(spec), *spec["containers"]]])


def _sidecars(spec: Manifest) -> list[Manifest]:
    return [container for container in spec.get("initContainers", ()) if container.get("restartPolicy") == "Always"]


def _requests(container: Manifest) -> tuple[float, float]:
    """CPUs and GiB."""
    cpu, memory = container["resources"]["requests"]["cpu"], container["resources"]["requests"]["memory"]
    cpus = int(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return cpus, int(memory[:-2]) / (1024 if memory.endswith("Mi") else 1)


def _sum(sizes: list[tuple[float, float]]) -> tuple[float, float]:
    return round(sum(cpu for cpu, _ in sizes), 3), sum(memory for _, memory in sizes)


def _secrets(manifests: list[Manifest]) -> set[str]:
    """Names of secrets that are referred to."""
    written = yaml.safe_dump(manifests)
    return set(re.findall(r"secretName: ([\w-]+)", written)) | set(
        re.findall(r"secretKeyRef:\n +key: \w+\n +name: ([\w-]+)", written)
    )


def _parsed(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a module's `main` makes of its command line."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(parse(parser, arguments))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main()
    found: argparse.Namespace = parsed.value.args[0]
    return found


def _selects(selector: Manifest, pod: PodTemplate) -> bool:
    fits = all(pod.labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        fits = fits and pod.labels.get(expression["key"]) in expression["values"]
    return fits


def _is_for_ray(policy: Manifest) -> bool:
    return bool(policy["podSelector"].get("matchLabels", {}) == {"ray.io/is-ray-node": "yes"})  # KubeRay's label


def _pod(of: str) -> PodTemplate:
    (found,) = [pod for pod in pods(build("base")) if pod.of == of]
    return found


def _cluster(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"].get("rayClusterConfig") or manifest["spec"]["rayClusterSpec"]
    return found


def _head(manifest: Manifest) -> Manifest:
    found: Manifest = _cluster(manifest)["headGroupSpec"]
    return found


def _drain(spec: Manifest) -> str:
    return str(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2])


def _resources(manifest: Manifest) -> Manifest:
    found: Manifest = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    return found


def _quotas(manifest: Manifest) -> list[Manifest]:
    found: list[Manifest] = manifest["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    return found
