"""Where pods go, which of them go first, what may stop them, and when they get traffic."""

from __future__ import annotations

import warnings

import pytest

from tests.support.manifests import BUILDS, K8S, build, cluster_of, only, pod_of, pods

GUIDE = (K8S / "README.md").read_text()
HOSTS = "RayService/genmodels/hosts"

every_build = pytest.mark.parametrize("name", BUILDS)


@every_build
def test_serving_comes_before_training(name: str) -> None:
    manifests = build(name)
    classes = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "PriorityClass"}
    of = {pod.of: classes[pod.spec["priorityClassName"]] for pod in pods(manifests) if "store" not in pod.of}
    training = [priority for pod, priority in of.items() if pod.startswith("RayJob/")]
    serving = [priority for pod, priority in of.items() if not pod.startswith("RayJob/")]
    assert max(each["value"] for each in training) < 0 < min(each["value"] for each in serving)
    assert {each["preemptionPolicy"] for each in training} == {"Never"}, "the dispatcher or Kueue orders runs"


@every_build
def test_autoscalers_of_nodes_leave_training_pods_alone(name: str) -> None:
    for pod in pods(build(name)):
        notes = pod.template["metadata"].get("annotations", {})
        kept = notes.get("karpenter.sh/do-not-disrupt"), notes.get("cluster-autoscaler.kubernetes.io/safe-to-evict")
        assert kept == (("true", "false") if pod.of.startswith("RayJob/") else (None, None)), pod.of


def test_hosts_of_a_cluster_are_on_different_nodes_for_certain() -> None:
    """Also while a second cluster is built, whose hosts have the same labels, and while a node is drained."""
    constraints = {each["topologyKey"]: each for each in pod_of(HOSTS).spec["topologySpreadConstraints"]}
    by_node = constraints["kubernetes.io/hostname"]
    assert (by_node["whenUnsatisfiable"], by_node["maxSkew"]) == ("DoNotSchedule", 1)
    assert by_node["matchLabelKeys"] == ["ray.io/cluster"]
    assert by_node["nodeTaintsPolicy"] == "Honor"


@every_build
def test_budgets_let_a_drain_go_on(name: str) -> None:
    """Ray clusters have no scale subresource: only a whole number of `minAvailable` works there."""
    manifests = build(name)
    budgets = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "PodDisruptionBudget"}
    if name.removeprefix("overlays/") in ("dev", "kind"):
        assert not budgets, "with one pod of each they would stop every drain"
        return
    (hosts,) = cluster_of(only(manifests, "RayService"))["workerGroupSpecs"]
    assert 1 <= budgets["genmodels-hosts"]["minAvailable"] < hosts["minReplicas"]
    assert "maxUnavailable" not in budgets["genmodels-hosts"]
    assert budgets["genmodels-jobs"]["maxUnavailable"] < only(manifests, "Deployment")["spec"]["replicas"]
    assert "at least one host stays ready" in GUIDE


def test_hosts_get_traffic_soon_and_keep_it_while_they_compute() -> None:
    """KubeRay waits for no readiness when it moves the Service, so the probe has to be quicker than its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing Ray Serve defines settings in ways that pydantic warns of
        from ray.serve._private.constants import PROXY_MIN_DRAINING_PERIOD_S

    container = pod_of(HOSTS).spec["containers"][0]
    probe = container["readinessProbe"]
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == probe["httpGet"]["port"]]
    assert (probe["httpGet"]["path"], port) == ("/-/healthz", 8000)
    assert (probe["periodSeconds"], probe.get("initialDelaySeconds", 0)) == (1, 0)
    assert probe["timeoutSeconds"] >= 10, "KubeRay's 2 s are too few for a host whose CPUs are all busy"
    out_after = probe["periodSeconds"] * probe["failureThreshold"]
    assert out_after < PROXY_MIN_DRAINING_PERIOD_S, "a proxy that drains still answers until it is out of the Service"
    assert not [mount for mount in container["volumeMounts"] if "wget" in mount["mountPath"]]


def test_a_host_that_hangs_is_not_drained_first() -> None:
    """The pod's grace is a drain's; a probe may have a shorter one of its own."""
    pod = pod_of(HOSTS).spec
    probe = pod["containers"][0]["livenessProbe"]
    assert probe["httpGet"] == {"path": "/api/healthz", "port": 52365}, "KubeRay's, for Ray 2.53 and newer"
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600, "as long as KubeRay's"
    assert probe["terminationGracePeriodSeconds"] < 60 < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    "text",
    [
        "--platform linux/amd64",
        "runtimeClassName",
        "waitForPodsReady",
        "delete rayservice genmodels",
        "SECRETS_REVISION=",
        "authOptions/secretName",
    ],
)
def test_the_guide_has(text: str) -> None:
    assert text in GUIDE


def test_the_uninstallation_keeps_redis_until_its_content_is_cleared() -> None:
    """KubeRay's clean-up Job runs after the RayCluster's pods have ended; without Redis it waits for its deadline."""
    steps = GUIDE[GUIDE.index("### Uninstall") :]
    assert steps.index("delete rayservice genmodels") < steps.index("delete -k")
