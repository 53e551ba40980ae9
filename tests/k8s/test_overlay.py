"""The overlay of the guide says image, storage and namespace once each, and every object follows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.manifests import K8S, Manifest, build, config_map_of, only, pods, problems, settings

GUIDE = (K8S / "README.md").read_text()
OVERLAY = re.findall(r"```yaml\n(apiVersion: kustomize.*?)```", GUIDE, re.DOTALL)[0].replace(
    "namespace: genmodels", "namespace: elsewhere"
)
PATCHES = re.findall(r"```yaml\n(patches:.*?)```", GUIDE, re.DOTALL)
MERGE = """\
resources: [../k8s/overlays/production]
configMapGenerator:
  - {{name: {setting}, behavior: merge, literals: [NEW=1]}}
"""


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("overlay")
    shutil.copytree(K8S, folder / "k8s")
    return _built(folder / "platform", OVERLAY)


def test_no_object_keeps_an_old_value(manifests: list[Manifest]) -> None:
    old = re.compile(r"s3://genmodels|(?<!/)genmodels(?:-cuda)?:\d|namespace: genmodels|metadata\.name: genmodels")
    for manifest in manifests:
        written = yaml.safe_dump(manifest)
        assert not old.findall(written), (manifest["kind"], manifest["metadata"]["name"])


def test_every_pod_has_the_image_and_the_storage(manifests: list[Manifest]) -> None:
    assert settings(manifests, "genmodels-platform")["GENMODELS_STORAGE"] == "s3://BUCKET/PREFIX"
    ours = [pod for pod in pods(manifests) if not pod.of.startswith("StatefulSet/")]
    assert {pod.of for pod in ours} >= {"RayJob/genmodels-template/gpu-workers", "RayService/genmodels/hosts"}
    for pod in ours:
        cuda = pod.of.endswith("/gpu-workers")
        image = "REGISTRY/genmodels-cuda" if cuda else "REGISTRY/genmodels"
        assert {container["image"].partition(":")[0] for container in pod.containers} == {image}, pod.of
        assert config_map_of(pod.spec["containers"][0], "genmodels-platform"), pod.of
    assert "storage" not in only(manifests, "RayService")["spec"]["serveConfigV2"]


def test_every_pod_has_an_account_with_the_pull_secret(manifests: list[Manifest]) -> None:
    accounts = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "ServiceAccount"}
    assert {account["imagePullSecrets"][0]["name"] for account in accounts.values()} == {"registry"}
    assert {pod.spec.get("serviceAccountName") for pod in pods(manifests)} == set(accounts)
    assert all(pod.spec.get("serviceAccountName") for pod in pods(build("overlays/dev"))), "also of its store"


def test_every_object_is_in_the_namespace_and_its_queue_admits_it(manifests: list[Manifest]) -> None:
    namespace = only(manifests, "Namespace")["metadata"]
    assert namespace["name"] == "elsewhere"
    cluster_wide = {"Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass", "PriorityClass"}
    assert {m["metadata"]["namespace"] for m in manifests if m["kind"] not in cluster_wide} == {"elsewhere"}
    assert {s["namespace"] for s in only(manifests, "RoleBinding")["subjects"]} == {"elsewhere"}
    selector = only(manifests, "ClusterQueue")["spec"]["namespaceSelector"]["matchLabels"]
    assert selector.items() <= namespace["labels"].items()


@pytest.mark.parametrize("component", sorted(path.name for path in (K8S / "components").iterdir()))
def test_each_component_follows_the_namespace(tmp_path: Path, component: str) -> None:
    """Also its texts: the label of Kueue's queue, the rules of alerts."""
    shutil.copytree(K8S, tmp_path / "k8s")
    base = "resources: [../k8s/base]\nnamespace: elsewhere\n"
    objects = _built(tmp_path / "platform", f"{base}components: [../k8s/components/{component}]\n")
    assert len([m for m in objects if m["kind"] == "Namespace"]) == 1
    others = [m for m in objects if m["kind"] not in ("Namespace", "PriorityClass")]
    assert {m["metadata"]["namespace"] for m in others} == {"elsewhere"}
    assert {problem for m in others if m["kind"] in ("DaemonSet", "NetworkPolicy") for problem in problems(m)} == set()


def test_the_label_by_which_the_guide_applies_the_namespace_first_is_on_nothing_else(manifests: list[Manifest]) -> None:
    (label,) = re.findall(r"apply -k platform -l (\S+)", GUIDE)
    key, _, value = label.partition("=")
    assert [m["kind"] for m in manifests if m["metadata"].get("labels", {}).get(key) == value] == ["Namespace"]


@pytest.mark.parametrize("patches", PATCHES)
def test_each_patch_of_the_guide_fits(tmp_path: Path, patches: str) -> None:
    """Kustomize ignores a target that is not there, and refuses a path that is not there."""
    shutil.copytree(K8S, tmp_path / "k8s")
    patched = _built(tmp_path / "platform", f"resources: [../k8s/overlays/production]\n{patches}")
    assert patched != build("overlays/production")
    assert not [problem for manifest in patched for problem in problems(manifest)]


@pytest.mark.parametrize("setting", ["genmodels-platform", "genmodels-ray"])
def test_a_changed_setting_rolls_out(tmp_path: Path, setting: str) -> None:
    """Every pod with the setting gets a new template, and no other pod."""
    shutil.copytree(K8S, tmp_path / "k8s")
    changed = MERGE.format(setting=setting)
    after = {pod.of: pod.template for pod in pods(_built(tmp_path / "platform", changed))}
    for pod in pods(build("overlays/production")):
        has_it = any(config_map_of(container, setting) for container in pod.containers)
        assert (pod.template != after[pod.of]) is has_it, pod.of


def _built(folder: Path, overlay: str) -> list[Manifest]:
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(overlay)
    return build(str(folder))
