"""Test that paths, names and numbers in k8s/README.md are right."""

from __future__ import annotations

import re

import ray

import genmodels
from tests.support.manifests import BUILDS, K8S, Manifest, build, cluster_of, only, pods, secrets_of
from tests.support.paths import ROOT

IMAGE = f"genmodels:{ray.__version__}-{genmodels.__version__}"


def test_the_guide_names_what_there_is() -> None:
    guide = (K8S / "README.md").read_text()
    assert all((ROOT / path.rstrip(".,")).exists() for path in re.findall(r"\bk8s/[\w./-]+", guide))
    for secret in set().union(*(secrets_of(build(name)) for name in BUILDS)):
        assert f"kubectl -n genmodels create secret generic {secret} " in guide
    assert IMAGE in guide
    assert IMAGE in (ROOT / ".github" / "workflows" / "kind.yaml").read_text()


def test_the_guide_counts_right() -> None:
    """Compare the requests of pods, and the number of pods that fit on a node."""
    size = {
        f"{name} {pod.of}": _size(pod.spec)
        for name in ("base", "overlays/dev", "overlays/gpu")
        for pod in pods(build(name))
    }
    service = only(build("base"), "RayService")
    autoscaler = _requests(cluster_of(service)["autoscalerOptions"])
    (hosts,) = cluster_of(service)["workerGroupSpecs"]
    head, host = size["base RayService/genmodels/head"], size["base RayService/genmodels/hosts"]
    rest = [*[size["base Deployment/genmodels-jobs"]] * 2, size["base StatefulSet/genmodels-redis"], head, autoscaler]
    dev = [requests for of, requests in size.items() if of.startswith("overlays/dev") and "RayJob" not in of]
    rows = {
        "platform, at rest (2 hosts)": _sum([*rest, *[host] * hosts["minReplicas"]]),
        "platform, at most (6 hosts); twice": _sum([*rest, *[host] * hosts["maxReplicas"]]),
        "platform, overlay dev": _sum(dev),
        "a run: its head": size["base RayJob/genmodels-template/head"],
        "a run: each worker": size["base RayJob/genmodels-template/workers"],
        "a run on GPUs: each worker": size["overlays/gpu RayJob/genmodels-template/gpu-workers"],
    }
    guide = (K8S / "README.md").read_text()
    for row, (cpu, memory) in rows.items():
        assert re.search(rf"\| {re.escape(row)}.*\| {cpu:g} \| {memory:g} GiB \|", guide), (row, cpu, memory)
    kinds = [host, rows["a run: each worker"], rows["a run on GPUs: each worker"]]
    for node, *fit in re.findall(r"^\| (\d+ CPU, \d+ GiB) \| (\d+) \| (\d+) \| (\d+) \|$", guide, re.MULTILINE):
        cpus, memory = (int(number) for number in re.findall(r"\d+", node))
        room = [int(min((cpus - 0.2) / kind[0], memory * 0.88 / kind[1])) for kind in kinds]
        assert [int(number) for number in fit] == room, node


def test_the_overlay_for_kind_fits_a_public_ci() -> None:
    """On 4 CPUs and 16 GB: the platform and a run of one worker, next to Kubernetes and the operator."""
    cpus, memory = _sum([_size(pod.spec) for pod in pods(build("overlays/kind"))])
    assert cpus <= 3.0
    assert memory <= 12.5


def _size(spec: Manifest) -> tuple[float, float]:
    return _sum([_requests(container) for container in [*_sidecars(spec), *spec["containers"]]])


def _sidecars(spec: Manifest) -> list[Manifest]:
    return [container for container in spec.get("initContainers", ()) if container.get("restartPolicy") == "Always"]


def _requests(container: Manifest) -> tuple[float, float]:
    """Return a container's requests: CPUs and GiB."""
    cpu, memory = container["resources"]["requests"]["cpu"], container["resources"]["requests"]["memory"]
    cpus = int(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return cpus, int(memory[:-2]) / (1024 if memory.endswith("Mi") else 1)


def _sum(sizes: list[tuple[float, float]]) -> tuple[float, float]:
    return round(sum(cpu for cpu, _ in sizes), 3), sum(memory for _, memory in sizes)
