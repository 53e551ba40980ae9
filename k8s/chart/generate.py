"""Write the templates of the Helm chart from what kustomize builds: make chart.

    python k8s/chart/generate.py [CHART]

Each object of base and of the chart's components becomes one template, in which values.yaml's values replace those of
the manifests. An object that a component adds is rendered only with that component; an object that a component changes
has one form without the component and one with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).resolve().parents[1]
COMPONENTS = tuple(yaml.safe_load((K8S / "chart" / "values.yaml").read_text())["components"])
NAMESPACE = "genmodels"
DIGEST = re.compile(r"(genmodels-(platform|pools))-[a-z0-9]{10}")

Object = dict[str, Any]
Forms = dict[str, str]  # a component, or "" for base: the text of an object in that build

CLUSTER, JOB_CLUSTER = "spec.rayClusterConfig", "spec.rayClusterSpec"
RESOURCES = "template.spec.containers.0.resources"
# Where values go, in JSON, which is YAML too. With `?` the field is left out if the value is empty.
PLACES = {
    "Deployment/genmodels-jobs": {"spec.replicas": "jobs.replicas"},
    "StatefulSet/genmodels-redis": {"spec.volumeClaimTemplates.0.spec": "redis.volume"},
    "ServiceAccount": {
        "metadata.annotations": "serviceAccounts.annotations?",
        "imagePullSecrets": "serviceAccounts.imagePullSecrets?",
    },
    "Namespace": {"metadata.name": ".Release.Namespace"},
    "ConfigMap/genmodels-platform": {"data": "platform"},
    "ConfigMap/genmodels-pools": {"data": '(include "pools-data" .)'},
    "RayService/genmodels": {
        f"{CLUSTER}.headGroupSpec.{RESOURCES}": "sizes.servingHead",
        f"{CLUSTER}.workerGroupSpecs.0.{RESOURCES}": "sizes.host",
        f"{CLUSTER}.workerGroupSpecs.0.replicas": "hosts.min",
        f"{CLUSTER}.workerGroupSpecs.0.minReplicas": "hosts.min",
        f"{CLUSTER}.workerGroupSpecs.0.maxReplicas": "hosts.max",
    },
    "RayJob/genmodels-template": {
        f"{JOB_CLUSTER}.headGroupSpec.{RESOURCES}": "sizes.trainingHead",
        f"{JOB_CLUSTER}.workerGroupSpecs.0.{RESOURCES}": "sizes.trainingWorker",
        f"{JOB_CLUSTER}.workerGroupSpecs.1.{RESOURCES}": "sizes.gpuWorker",
    },
}
# Values inside of texts.
TEXTS = {
    "RayService/genmodels": {
        r"min_replicas: \d+": "min_replicas: {{ .Values.hosts.min }}",
        r"max_replicas: \d+": "max_replicas: {{ .Values.hosts.max }}",
    }
}
IMAGES = {"genmodels": "repository", "genmodels-cuda": "cudaRepository"}


def write(chart: Path) -> None:
    """Write all templates, and remove those of objects that are gone."""
    for old in (chart / "templates").glob("*.yaml"):
        old.unlink()
    for name, forms in objects().items():
        (chart / "templates" / f"{name.lower().replace('/', '.')}.yaml").write_text(chosen(name, forms))


def objects() -> dict[str, Forms]:
    """Return the forms of each object, by its kind and name."""
    forms: dict[str, Forms] = {}
    for component in ("", *COMPONENTS):
        for built in build(component):
            name = DIGEST.sub(r"\1", f"{built['kind']}/{built['metadata']['name']}")
            forms.setdefault(name, {})[component] = template(name, built)
    return forms


def build(component: str) -> Iterator[Object]:
    with tempfile.TemporaryDirectory() as folder:
        to = relpath(K8S, Path(folder).resolve())
        added = [f"{to}/components/{component}"] if component else []
        (Path(folder) / "kustomization.yaml").write_text(
            yaml.safe_dump({"resources": [f"{to}/base"], "components": added})
        )
        yield from yaml.safe_load_all(subprocess.check_output(["kubectl", "kustomize", folder], text=True))


def chosen(name: str, forms: Forms) -> str:
    """Return the text that renders the form for the components that are on."""
    plain = forms.get("")
    own = {component: text for component, text in forms.items() if component and text != plain}
    if len(own) > 1:
        raise SystemExit(f"{name}: {' and '.join(own)} both change it, and a chart cannot add up their changes")
    if plain is not None and len(forms) <= len(COMPONENTS):
        raise SystemExit(f"{name}: {' and '.join({*COMPONENTS} - {*forms})} removes it, which a chart cannot")
    if not own:
        return forms[""]
    ((component, changed),) = own.items()
    otherwise = "" if plain is None else f"{{{{- else }}}}\n{plain}"
    return f'{{{{- if index .Values.components "{component}" }}}}\n{changed}{otherwise}{{{{- end }}}}\n'


def template(name: str, built: Object) -> str:
    """Return an object as a template: what is a value becomes an expression, and braces in its texts are escaped."""
    expressions: list[str] = []

    def token(expression: str) -> str:
        expressions.append(expression)
        return f"HELM{len(expressions) - 1}X"

    for place, value in {**PLACES.get(built["kind"], {}), **PLACES.get(name, {})}.items():
        _put(built, place.split("."), token(value if value[0] in ".(" else f"toJson .Values.{value}"))
    texts = TEXTS.get(name, {})
    text = yaml.safe_dump(_named(built, token), sort_keys=False, width=sys.maxsize, allow_unicode=True)
    text = text.replace("{{", '{{ "{{" }}')
    for pattern, to in texts.items():
        text, count = re.subn(pattern, to, text)
        if not count:
            raise SystemExit(f"{name}: {pattern!r} is not there any more")
    text = re.sub(r"^( *)(\w+): HELM(\d+)X$", lambda match: _field(match, expressions[int(match[3])]), text, flags=re.M)
    text = re.sub(r"HELM(\d+)X", lambda match: f"{{{{ {expressions[int(match[1])]} }}}}", text)
    if built["kind"] == "Namespace":
        return f"{{{{- if .Values.createNamespace }}}}\n{text}{{{{- end }}}}\n"
    return text


def _field(match: re.Match[str], expression: str) -> str:
    indent, key = match[1], match[2]
    if not expression.endswith("?"):
        return f"{indent}{key}: {{{{ {expression} }}}}"
    value = expression.removeprefix("toJson ").removesuffix("?")
    return f"{{{{- with {value} }}}}\n{indent}{key}: {{{{ toJson . }}}}\n{{{{- end }}}}"


def _put(node: Any, path: list[str], value: str) -> None:
    """Set a field; not in a list that is too short, e.g. the second group of workers without GPUs."""
    *parents, last = path
    for key in parents:
        if isinstance(node, list) and int(key) >= len(node):
            return
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value


def _named(node: Any, token: Any, key: str = "") -> Any:
    """Return a copy with the release's names: its namespace, its images, and the ConfigMap of its settings."""
    if isinstance(node, dict):
        return {name: _named(value, token, name) for name, value in node.items()}
    if isinstance(node, list):
        return [_named(value, token, key) for value in node]
    if key == "namespace" and node == NAMESPACE:
        return token(".Release.Namespace")
    if key == "image" and (repository := IMAGES.get(node.partition(":")[0])):
        return f"{token(f'.Values.image.{repository}')}:{token('.Values.image.tag')}"
    if isinstance(node, str) and (match := DIGEST.fullmatch(node)):
        return token(f'include "{match[2]}-name" .')
    return node


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
