"""Test that the Helm chart renders what kustomize builds, object by object."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.support.manifests import K8S, Manifest, build, build_with, kubectl, problems, settings

TOOLS = Path(sys.prefix) / "k8s-tools" / "bin"
HELM = shutil.which("helm", path=os.pathsep.join([os.environ["PATH"], str(TOOLS)]))

needs_helm = pytest.mark.skipif(not HELM, reason="no helm, so the chart is not rendered: `make test-k8s` brings it")

CLUSTER_WIDE = {"ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass", "PriorityClass"}
VALUES = {  # every value that an overlay can set in one place, too
    "image": {
        "repository": "registry.example/team/genmodels",
        "cudaRepository": "registry.example/cuda",
        "tag": "1.2.3",
    },
    "platform": {"GENMODELS_STORAGE": "s3://other/place", "AWS_ENDPOINT_URL": "https://s3.example.com/?a&b"},
    "serviceAccounts": {"annotations": {"cloud/role": "r"}, "imagePullSecrets": [{"name": "registry"}]},
    "jobs": {"replicas": 3},
    "redis": {"volume": {"storageClassName": "gp3"}},
    "components": {"gpu": True, "kueue": True, "monitoring": True},
}
OVERLAY = """
resources: [../production]
namespace: elsewhere
images:
  - {name: genmodels, newName: registry.example/team/genmodels, newTag: 1.2.3}
  - {name: genmodels-cuda, newName: registry.example/cuda, newTag: 1.2.3}
replicas:
  - {name: genmodels-jobs, count: 3}
configMapGenerator:
  - name: genmodels-platform
    behavior: merge
    literals: [GENMODELS_STORAGE=s3://other/place, "AWS_ENDPOINT_URL=https://s3.example.com/?a&b"]
patches:
  - target: {kind: ServiceAccount}
    patch: |
      - {op: add, path: /metadata/annotations, value: {cloud/role: r}}
      - {op: add, path: /imagePullSecrets, value: [{name: registry}]}
  - target: {kind: StatefulSet}
    patch: |
      - {op: add, path: /spec/volumeClaimTemplates/0/spec/storageClassName, value: gp3}
"""


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart", K8S / "chart" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chart(generator: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chart") / "genmodels"
    shutil.copytree(K8S / "chart", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join([str(Path(kubectl()).parent), os.environ["PATH"]]))
        generator.write(folder)
    return folder


def rendered(chart: Path, values: dict[str, Any], namespace: str = "genmodels") -> list[Manifest]:
    assert HELM
    (chart.parent / "values.yaml").write_text(yaml.safe_dump({"createNamespace": True, **values}))
    command = [HELM, "template", "any", str(chart), "-n", namespace, "-f", str(chart.parent / "values.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


SCHEMA = json.loads((K8S / "chart" / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((K8S / "chart" / "values.yaml").read_text())


def test_the_schema_knows_each_value() -> None:
    """Helm checks values by it at each command."""
    Draft7Validator.check_schema(SCHEMA)
    Draft7Validator(SCHEMA).validate(DEFAULTS)
    assert SCHEMA["properties"].keys() == {*DEFAULTS, "global"}  # Helm adds the last
    for name in DEFAULTS.keys() - {"createNamespace", "platform", "pools"}:
        assert SCHEMA["properties"][name]["properties"].keys() == DEFAULTS[name].keys(), name


def test_its_pools_are_those_of_the_base() -> None:
    pools = DEFAULTS["pools"]
    for name, value in DEFAULTS["hosts"].items():
        pools = pools.replace(f"{{{{ .Values.hosts.{name} }}}}", str(value))
    assert pools == (K8S / "base" / "pools.yaml").read_text()


def with_value(place: str, value: object) -> dict[str, Any]:
    section, name = place.split(".")
    return {**DEFAULTS, section: {**DEFAULTS[section], name: value}}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("image.repository", ""),
        ("image.tag", 2.6),  # --set reads 2.60 as a number
        ("image.repo", "registry.example/genmodels"),
        ("components.ray-logs", True),
        ("components.gpu", "false"),
        ("platform.GENMODELS_STORAGE", ""),
        ("platform.GENMODELS_STORAGE", "file:///tmp"),
        ("platform.AWS_EC2_METADATA_DISABLED", True),
        ("platform.a b", "c"),
        ("hosts.min", "2"),
        ("hosts.max", 0),
        ("jobs.replicas", None),
        ("sizes.host", {"requests": {"cpu": 4, "memory": "8Gi"}}),
        ("serviceAccounts.imagePullSecrets", ["registry"]),
    ],
)
def test_a_value_that_cannot_be_is_refused(place: str, value: object) -> None:
    assert not Draft7Validator(SCHEMA).is_valid(with_value(place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("image.repository", "registry.example:5000/team/genmodels"),
        ("image.tag", "2.60.0-0.1.0@sha256:" + "a" * 64),
        ("platform.AWS_ENDPOINT_URL", "https://s3.example.com/?a&b"),
    ],
)
def test_a_value_of_the_guide_is_taken(place: str, value: object) -> None:
    Draft7Validator(SCHEMA).validate(with_value(place, value))


@needs_helm
@pytest.mark.parametrize(
    ("values", "problem"),
    [({"image": {"repository": ""}}, "repository"), ({"hosts": {"min": 7}}, "hosts.min is above hosts.max")],
)
def test_helm_says_which_value_is_wrong(chart: Path, values: dict[str, Any], problem: str) -> None:
    (chart.parent / "wrong.yaml").write_text(yaml.safe_dump(values))
    command = [str(HELM), "template", "any", str(chart), "-f", str(chart.parent / "wrong.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert problem in done.stderr


@needs_helm
@pytest.mark.parametrize("names", [(), ("gpu",), ("kueue",), ("monitoring",), ("gpu", "kueue", "monitoring")])
def test_it_renders_what_kustomize_builds(chart: Path, names: tuple[str, ...]) -> None:
    manifests = rendered(chart, {"components": dict.fromkeys(names, True)})
    assert by_name(manifests) == by_name(build_with(*names))


@needs_helm
def test_it_renders_all_components_together(chart: Path) -> None:
    names = list(yaml.safe_load((K8S / "chart" / "values.yaml").read_text())["components"])
    manifests = rendered(chart, {"components": dict.fromkeys(names, True)})
    assert by_name(manifests) == by_name(build_with(*names))


@needs_helm
def test_its_values_say_what_an_overlay_says(chart: Path, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s", ignore=shutil.ignore_patterns("chart"))
    (tmp_path / "k8s" / "overlays" / "mine").mkdir()
    (tmp_path / "k8s" / "overlays" / "mine" / "kustomization.yaml").write_text(OVERLAY)
    overlay = by_name(build(str(tmp_path / "k8s" / "overlays" / "mine")))
    for (kind, _), manifest in overlay.items():
        if kind in CLUSTER_WIDE:  # kustomize does not know that of kinds of CRDs; the API server drops it
            manifest["metadata"].pop("namespace", None)
    assert by_name(rendered(chart, VALUES, "elsewhere")) == overlay


@needs_helm
def test_sizes_and_numbers_of_hosts_reach_their_places(chart: Path) -> None:
    small = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
    names = ("servingHead", "host", "trainingHead", "trainingWorker", "gpuWorker")
    values = {"sizes": dict.fromkeys(names, small), "hosts": {"min": 4, "max": 9}, "components": {"gpu": True}}
    manifests = by_name(rendered(chart, values))
    assert [problem for manifest in manifests.values() for problem in problems(manifest)] == []
    service = manifests["RayService", "genmodels"]["spec"]
    (hosts,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert (hosts["replicas"], hosts["minReplicas"], hosts["maxReplicas"]) == (4, 4, 9)
    for deployment in yaml.safe_load(service["serveConfigV2"])["applications"][0]["deployments"]:
        scaling = deployment["autoscaling_config"]
        assert (scaling["min_replicas"], scaling["max_replicas"]) == (4, 9)
    (pool,) = yaml.safe_load(settings(list(manifests.values()), "genmodels-pools")["pools.yaml"])["pools"]
    assert (pool["min_replicas"], pool["max_replicas"]) == (4, 9)
    job = manifests["RayJob", "genmodels-template"]["spec"]["rayClusterSpec"]
    for cluster in (service["rayClusterConfig"], job):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            resources = group["template"]["spec"]["containers"][0]["resources"]
            assert resources["limits"].items() >= small["limits"].items()


def test_changes_that_a_chart_cannot_express_are_refused(generator: ModuleType) -> None:
    same = dict.fromkeys(["", *generator.COMPONENTS], "plain\n")
    assert generator.chosen("RayJob/x", same) == "plain\n"
    assert generator.chosen("RayJob/x", {**same, "kueue": "queued\n"}) == (
        '{{- if index .Values.components "kueue" }}\nqueued\n{{- else }}\nplain\n{{- end }}\n'
    )
    with pytest.raises(SystemExit, match="gpu and kueue both change it"):
        generator.chosen("RayJob/x", {**same, "gpu": "other\n", "kueue": "queued\n"})
    with pytest.raises(SystemExit, match="gpu and kueue both change it"):
        generator.chosen("RayJob/x", {"gpu": "other\n", "kueue": "other\n"})
    del same["gpu"]
    with pytest.raises(SystemExit, match="gpu removes it"):
        generator.chosen("RayJob/x", same)
