"""Test that the manifests build, and that Kubernetes, its operators, a security linter and Prometheus accept them."""

from __future__ import annotations

import copy
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.manifests import (
    BUILDS,
    K8S,
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
    secrets_of,
    selects,
    unrestricted,
)
from tests.support.paths import ROOT

TOOLS = Path(sys.prefix) / "k8s-tools" / "bin"  # `make test-k8s` makes it
STRICT = ROOT.parent / "shared" / "k8s"
OWN_PROBE = "readinessProbe: replaces KubeRay's own"  # on purpose: test_placement.py
RULES = ROOT / "docker" / "prometheus" / "rules"

every_build = pytest.mark.parametrize("name", BUILDS)


@every_build
def test_it_builds_and_fits_the_schemas(name: str) -> None:
    manifests = build(name)
    assert {problem for manifest in manifests for problem in problems(manifest)} == set()
    ids = [(m["apiVersion"], m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(ids) == len(set(ids))
    cluster_wide = {"Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass", "PriorityClass"}
    namespaces = {m["metadata"].get("namespace") for m in manifests if m["kind"] not in cluster_wide}
    assert namespaces == {"genmodels"}
    assert not [m for m in manifests if m["kind"] == "Secret"]


class Strict(yaml.SafeLoader):
    """Refuse a key that a mapping has twice: the tools take one of both in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{node.start_mark}: {twice}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("path", sorted(K8S.rglob("*.yaml")), ids=lambda path: str(path.relative_to(K8S)))
def test_no_file_has_a_key_twice(path: Path) -> None:
    if path.parent == K8S / "chart" / "templates":
        return  # made, and no YAML until it is rendered
    for _ in yaml.load_all(path.read_text(), Strict):
        pass


BROKEN: dict[str, tuple[str, Callable[[Manifest], Any]]] = {
    "a misspelt field": ("Deployment", lambda m: m["spec"].update(replica=2)),
    "a field in the wrong place": ("Deployment", lambda m: m["spec"].update(containers=[])),
    "a string for a number": ("Deployment", lambda m: m["spec"].update(replicas="2")),
    "no selector": ("Deployment", lambda m: m["spec"].pop("selector")),
    "a unit that there is not": ("Deployment", lambda m: _resources(m).update(memory="4GB")),
    "null": ("Service", lambda m: m["spec"].update(selector=None)),
    "a port without a number": ("Service", lambda m: m["spec"]["ports"][0].pop("port")),
    "a misspelt field of KubeRay's": ("RayService", lambda m: m["spec"].update(serveConfig="")),
    "a word that KubeRay does not know": ("RayService", lambda m: cluster_of(m)["authOptions"].update(mode="tokens")),
    "a number where Ray takes strings": ("RayService", lambda m: head_of(m)["rayStartParams"].update({"num-cpus": 0})),
    "a pod in a Ray cluster, misspelt": ("RayService", lambda m: head_of(m)["template"]["spec"].update(tolerance=[])),
    "a container without a name": ("RayJob", lambda m: head_of(m)["template"]["spec"]["containers"][0].pop("name")),
    "a negative deletion delay": ("RayService", lambda m: m["spec"].update(rayClusterDeletionDelaySeconds=-1)),
    "a quota that is no quantity": ("ClusterQueue", lambda m: quotas_of(m)[0].update(nominalQuota="many")),
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
    autoscaler = cluster_of(only(manifests, "RayService")).get("autoscalerOptions")
    if autoscaler:
        pod_spec = head_of(only(manifests, "RayService"))["template"]["spec"]
        whole = {**pod_spec, "containers": [{"name": "autoscaler", "securityContext": autoscaler["securityContext"]}]}
        assert not unrestricted(whole)


LOOSE: dict[str, Callable[[Manifest], Any]] = {
    "root": lambda spec: spec["securityContext"].update(runAsUser=0),
    "the user of the image": lambda spec: spec["securityContext"].pop("runAsNonRoot"),
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
    spec = copy.deepcopy(pod_of("RayService/genmodels/head").spec)
    LOOSE[what](spec)
    assert unrestricted(spec)


@every_build
def test_only_the_gateway_is_open(name: str) -> None:
    manifests = build(name)
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    open_to_all = [name for name, spec in policies.items() for rule in spec.get("ingress", ()) if not rule.get("from")]
    assert open_to_all == ["gateway"]
    gate = policies["gateway"]
    assert gate["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    assert [pod.of for pod in pods(manifests) if selects(gate["podSelector"], pod)] == ["RayService/genmodels/hosts"]
    for spec in policies.values():  # each selects pods that exist
        assert _is_for_ray(spec) or any(selects(spec["podSelector"], pod) for pod in pods(manifests))


def test_what_is_scraped_is_there_and_may_be_reached() -> None:
    manifests = build("overlays/monitoring")
    reachable = {port["port"] for port in only(manifests, "NetworkPolicy", "monitoring")["spec"]["ingress"][0]["ports"]}
    scraped: dict[str, set[str]] = {}
    for monitor in [m for m in manifests if m["kind"] == "PodMonitor"]:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        job = endpoint["relabelings"][0]["replacement"]
        for pod in pods(manifests):
            if selects(monitor["spec"]["selector"], pod):
                ports = [
                    port for c in pod.containers for port in c.get("ports", ()) if port["name"] == endpoint["port"]
                ]
                assert [port["containerPort"] in reachable for port in ports] == [True], (pod.of, endpoint)
                scraped.setdefault(job, set()).add(pod.of)
    rays = {pod.of for pod in pods(manifests) if pod.of.startswith("Ray")}
    assert scraped == {
        "genmodels-nodes": rays,
        "genmodels-ray": rays,
        "genmodels-jobs": {"Deployment/genmodels-jobs"},
    }
    compose = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())["scrape_configs"]
    assert {job["job_name"] for job in compose} - {"prometheus"} == set(scraped), "alerts name these jobs"


def test_exporters_see_the_processes_whose_metrics_they_read() -> None:
    for pod in pods(build("base")):
        if not pod.of.startswith("Ray"):
            continue
        assert pod.spec["shareProcessNamespace"] is True
        (sidecar,) = pod.spec["initContainers"]
        assert sidecar["restartPolicy"] == "Always"
        for container in (sidecar, pod.spec["containers"][0]):
            assert {"name": "metrics", "mountPath": "/run/metrics"} in container["volumeMounts"]
            assert config_map_of(container, "genmodels-ray")


def test_rules_are_those_of_compose() -> None:
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
    """Write Ray's pods as plain pods first: the linter does not know Ray's kinds."""
    manifests = build("overlays/production") + [
        m for m in build("overlays/dev") if m["metadata"]["name"] == "genmodels-store"
    ]
    written = [m for m in manifests if m["apiVersion"] != "ray.io/v1"]
    for pod in pods(manifests):
        if pod.of.startswith("Ray"):
            meta = {"name": pod.of.lower().replace("/", "-"), "namespace": "genmodels", **pod.template["metadata"]}
            written.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod.spec})
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(written))
    command = [
        str(TOOLS / "checkov"),
        "-f",
        str(tmp_path / "all.yaml"),
        "--config-file",
        str(ROOT / "tests" / "k8s" / "checkov.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Passed checks: [1-9]\d\d", done.stdout), done.stdout


@pytest.mark.skipif(
    not STRICT.exists() or not TOOLS.exists(), reason="no ../shared/k8s, or `make test-k8s` not run yet"
)
@every_build
def test_the_strict_validator_passes(name: str, tmp_path: Path) -> None:
    """Check the rules that an API server and the operators have in code, and references between documents."""
    known_there = [m for m in build(name) if not m["apiVersion"].startswith("cilium.io/")]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(known_there))
    external = [f"Secret/{secret}" for secret in secrets_of(build(name))] + ["ConfigMap/kube-root-ca.crt"]
    command = [str(TOOLS / "python"), str(STRICT / "validate_manifests.py"), str(tmp_path / "all.yaml")]
    options = ["--schemas", str(STRICT / "schemas"), "--k8s", "1.33", "--strict-refs"]
    known = [part for reference in external for part in ("--external", reference)]
    done = subprocess.run([*command, *options, *known], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    warnings = [line for line in output.splitlines() if line.startswith("WARN") and OWN_PROBE not in line]
    assert not warnings, output


def _is_for_ray(policy: Manifest) -> bool:
    return bool(policy["podSelector"].get("matchLabels", {}) == {"ray.io/is-ray-node": "yes"})  # KubeRay's label


def _resources(manifest: Manifest) -> Manifest:
    limits: Manifest = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    return limits
