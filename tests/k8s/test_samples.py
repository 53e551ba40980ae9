"""Test the samples and the optional components: they fit the schemas, the base, and the limits of compose's edge."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.manifests import (
    K8S,
    Manifest,
    build,
    build_with,
    cluster_of,
    config_map_of,
    only,
    pods,
    problems,
    secrets_of,
    settings,
)
from tests.support.paths import ROOT

SAMPLES = sorted((K8S / "samples").glob("*.yaml"))
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
EDGE = (ROOT / "docker" / "edge.conf").read_text()
SERVICE, PORT = "genmodels-serve-svc", 8000  # KubeRay makes the service


def sample(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((K8S / "samples" / name).read_text()))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_fits_the_schemas(path: Path) -> None:
    manifests = sample(path.name)
    assert [problem for manifest in manifests for problem in problems(manifest)] == []
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {"genmodels"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_builds_alone_and_fits_the_schemas(name: str, tmp_path: Path) -> None:
    manifests = build_with(name)
    assert {problem for manifest in manifests for problem in problems(manifest)} == set()


def edge(directive: str) -> str:
    match = re.search(rf"^\s*{directive} ([^;]+);", EDGE, re.MULTILINE)
    assert match, directive
    return match[1]


def test_the_ingress_has_the_limits_of_the_edge() -> None:
    (ingress,) = sample("ingress.yaml")
    notes = {key.partition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert notes["client-max-body-size"] == edge("client_max_body_size")
    assert notes["proxy-read-timeout"] == edge("proxy_read_timeout")
    assert notes["proxy-connect-timeout"] == edge("proxy_connect_timeout")
    assert notes["proxy-next-upstream"] == edge("proxy_next_upstream")
    assert notes["proxy-buffering"] == "False"
    assert edge("proxy_buffering") == "off"
    (rule,) = ingress["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": SERVICE, "port": {"number": PORT}}
    assert [tls["hosts"] for tls in ingress["spec"]["tls"]] == [[rule["host"]]]


def test_the_gateway_has_the_limits_of_the_edge() -> None:
    manifests = sample("gateway.yaml")
    (gateway,) = [m for m in manifests if m["kind"] == "Gateway"]
    listeners = {listener["name"]: listener for listener in gateway["spec"]["listeners"]}
    assert listeners["https"]["tls"]["certificateRefs"] == [{"name": "genmodels-tls"}]
    for route in (m for m in manifests if m["kind"] == "HTTPRoute"):
        assert all(parent["sectionName"] in listeners for parent in route["spec"]["parentRefs"])
    (rule,) = only(manifests, "HTTPRoute", "genmodels")["spec"]["rules"]
    assert rule["timeouts"] == {"request": edge("proxy_read_timeout")}
    assert rule["backendRefs"] == [{"name": SERVICE, "port": PORT}]
    client, backend = only(manifests, "ClientTrafficPolicy")["spec"], only(manifests, "BackendTrafficPolicy")["spec"]
    assert client["timeout"]["http"] == {
        "requestHeadersReceivedTimeout": edge("client_header_timeout"),
        "requestReceivedTimeout": edge("client_body_timeout"),
        "idleTimeout": edge("keepalive_timeout"),
    }
    assert client["connection"]["connectionLimit"]["value"] == int(edge("worker_connections"))
    assert backend["requestBuffer"]["limit"].lower() == edge("client_max_body_size") + "i"
    assert backend["timeout"]["tcp"]["connectTimeout"] == edge("proxy_connect_timeout")
    for policy in (client, backend):
        for target in policy["targetRefs"]:
            assert only(manifests, target["kind"], target["name"])["apiVersion"].startswith(target["group"])


def test_external_secrets_are_those_that_the_guide_creates() -> None:
    guide = (K8S / "README.md").read_text()
    created = dict(re.findall(r"create secret generic (\S+) --from-\w+=([\w.]+)=", guide))
    external = {m["metadata"]["name"]: m["spec"]["data"][0]["secretKey"] for m in sample("external-secrets.yaml")}
    assert external == {name: created[name] for name in external}
    assert secrets_of(build("base")) <= external.keys()


def test_the_quota_has_room_for_the_platform_at_its_largest() -> None:
    hard = only(sample("quota.yaml"), "ResourceQuota")["spec"]["hard"]
    guide = (K8S / "README.md").read_text()
    largest = re.search(r"^\| platform, at most.*\| ([\d.]+) \| ([\d.]+) GiB \|$", guide, re.MULTILINE)
    worker = re.search(r"^\| a run: each worker \| ([\d.]+) \| ([\d.]+) GiB \|$", guide, re.MULTILINE)
    assert largest
    assert worker
    assert float(hard["requests.cpu"]) >= 2 * float(largest[1]) + 20 * float(worker[1])
    assert float(hard["requests.memory"].removesuffix("Gi")) >= 2 * float(largest[2]) + 20 * float(worker[2])


def test_kuberay_accepts_the_incremental_upgrade(tmp_path: Path) -> None:
    """ValidateClusterUpgradeOptions of KubeRay's validation.go."""
    service = only(build_with("incremental-upgrade"), "RayService")
    strategy = service["spec"]["upgradeStrategy"]
    options = strategy["clusterUpgradeOptions"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert cluster_of(service)["enableInTreeAutoscaling"] is True
    assert 0 <= options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert options["intervalSeconds"] > 0
    assert options["gatewayClassName"]


def test_ray_logs_are_read_where_pods_write_them() -> None:
    manifests = [*build("base"), *build("ray-logs")]
    assert {problem for manifest in build("ray-logs") for problem in problems(manifest)} == set()
    config = settings(manifests, "ray-logs")["fluent-bit.yaml"]
    (tail,) = yaml.safe_load(config)["pipeline"]["inputs"]
    volumes = set(re.findall(r"kubernetes\.io~empty-dir/(\w+)/ray/session_", tail["path"]))
    for pod in pods(manifests):
        if not pod.of.startswith("Ray"):
            continue
        (mount,) = [m for m in pod.spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/tmp"]
        assert {mount["name"]} == volumes
        assert any(volume["name"] == mount["name"] and "emptyDir" in volume for volume in pod.spec["volumes"])
    daemon = only(manifests, "DaemonSet")["spec"]["template"]["spec"]
    store = settings(manifests, "ray-logs-store")
    used = set(re.findall(r"\$\{(\w+)\}", config))
    assert used <= {*store, *(env["name"] for env in daemon["containers"][0]["env"])}
    assert config_map_of(daemon["containers"][0], "ray-logs-store")
    storage = settings(manifests, "genmodels-platform")["GENMODELS_STORAGE"]
    assert storage.startswith(f"s3://{store['BUCKET']}/")


def test_ray_logs_are_set_by_an_overlay(tmp_path: Path) -> None:
    """The guide's, with another namespace."""
    page = (K8S / "PLATFORMS.md").read_text()
    (overlay,) = re.findall(r"```yaml\n(apiVersion: kustomize[^`]*k8s/ray-logs[^`]*)```", page)
    shutil.copytree(K8S, tmp_path / "k8s")
    (tmp_path / "ray-logs").mkdir()
    (tmp_path / "ray-logs" / "kustomization.yaml").write_text(f"{overlay}namespace: elsewhere\n")
    manifests = build(str(tmp_path / "ray-logs"))
    assert settings(manifests, "ray-logs-store")["AWS_ENDPOINT_URL"] == "https://S3.EXAMPLE.COM"
    assert {m["metadata"].get("namespace") for m in manifests if m["kind"] != "Namespace"} == {"elsewhere"}
    assert not re.search("genmodels-logs|amazonaws", yaml.safe_dump_all(manifests))


SERVING = 'name="genmodels"'
QUEUE = 'cluster_queue="genmodels"'
FIRING = {  # a series, its values of each minute, and when the alert fires
    "KubeRayAway": ("up", "1x60", "15m"),
    "ServingClusterNotReady": (f'kuberay_service_condition_ready{{{SERVING}, condition="false"}}', "1x60", "15m"),
    "ServingUpgradeStuck": (
        f'kuberay_service_condition_upgrade_in_progress{{{SERVING}, condition="true"}}',
        "1x60",
        "50m",
    ),
    "ClusterQueueInactive": (f'kueue_cluster_queue_status{{{QUEUE}, status="active"}}', "0x60", "15m"),
    "RunsInadmissible": (f'kueue_pending_workloads{{{QUEUE}, status="inadmissible"}}', "2x90", "70m"),
    "RunsEvictedUnready": (f'kueue_evicted_workloads_total{{{QUEUE}, reason="PodsReadyTimeout"}}', "0+1x60", "30m"),
}


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: Debian's package prometheus has it")
def test_alerts_of_the_operators_fire_and_stay_silent(tmp_path: Path) -> None:
    rule = yaml.safe_load((K8S / "components" / "operators" / "prometheusrule.operators.yaml").read_text())
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]))
    alerts = [alert["alert"] for group in rule["spec"]["groups"] for alert in group["rules"]]
    assert sorted(alerts) == sorted(FIRING)
    cases = [case for alert in alerts for case in _cases(alert, *FIRING[alert])]
    document = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(document))
    for command in (["check", "rules", "--lint-fatal", "rules.yml"], ["test", "rules", "tests.yml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    page = (K8S / "PLATFORMS.md").read_text()
    assert all(f"| `{alert}` |" in page for alert in alerts)


def _cases(alert: str, series: str, values: str, when: str) -> list[dict[str, Any]]:
    """Return a test in which the alert fires, and one with the series of another platform, in which it does not."""
    known = [] if alert == "KubeRayAway" else [(f"kuberay_service_info{{{SERVING}}}", "1x90")]
    other = series.replace(SERVING, 'name="others"').replace(QUEUE, 'cluster_queue="others"')
    firing = {"labels": "{}", "value": 1}
    here = _case(alert, when, [*known, (series, values)], [firing])
    return [here, _case(alert, when, [(f"kuberay_service_info{{{SERVING}}}", "1x90"), (other, values)], [])]


def _case(alert: str, when: str, series: list[tuple[str, str]], expected: list[Any]) -> dict[str, Any]:
    fired = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [{"expr": fired, "eval_time": when, "exp_samples": expected}],
    }
