"""Build the pods of a RayJob as KubeRay 1.7.0 does.

The facts are those of ray-operator/controllers/ray/common/pod.go (DefaultHeadPodTemplate, DefaultWorkerPodTemplate,
BuildPod) and utils/constant.go, with the operator's default options, for a cluster without autoscaling, fault tolerance
or TLS.
"""

from __future__ import annotations

import copy
from typing import Any

Object = dict[str, Any]

GCS_PORT = "6379"
AGENT_PORT = 52365
COMMAND = ["/bin/bash", "-c", "--"]
HTTP_PROBES = (2, 53)  # the first version of Ray whose nodes are probed over HTTP, without a shell in the container


def build_pods(job: Object) -> list[Object]:
    """Return the head's pod, and one pod for each replica of each group of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [(group, group.get("replicas", 1)) for group in cluster["workerGroupSpecs"]]
    head = _pod(job, cluster["headGroupSpec"], "headgroup", is_head=True)
    return [head, *(_pod(job, group, group["groupName"], False) for group, count in groups for _ in range(count))]


def _pod(job: Object, group: Object, name: str, is_head: bool) -> Object:
    cluster, kind = f"{job['metadata']['name']}-4q7xk", "head" if is_head else "worker"
    service = f"{cluster}-head-svc.{job['metadata'].get('namespace', 'genmodels')}.svc.cluster.local"
    template = copy.deepcopy(group["template"])
    spec, metadata = template["spec"], template.setdefault("metadata", {})
    own = {"ray.io/node-type": kind, "ray.io/group": name, "ray.io/cluster": cluster}
    more = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{cluster}-{kind}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    metadata["labels"] = more | (metadata.get("labels") or {}) | own
    owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": cluster, "controller": True}
    metadata["ownerReferences"] = [owner]
    metadata["generateName"] = f"{cluster}-head-" if is_head else f"{cluster}-{name}-worker-"
    ray = spec["containers"][0]
    if not is_head:
        spec.setdefault("initContainers", []).append(_wait_for_gcs(ray, service))
    for container in spec.get("initContainers", ()):
        _add(container, FQ_RAY_IP=service, RAY_IP=service.partition(".")[0])
    _share_memory(spec, ray)
    start = ray_start(group, ray.get("resources") or {}, is_head, service)
    ray |= {"command": COMMAND, "args": [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"]}
    _add(ray, **({} if is_head else {"FQ_RAY_IP": service, "RAY_IP": service.partition(".")[0]}))
    _add(ray, KUBERAY_GEN_RAY_START_CMD=start, RAY_PORT=GCS_PORT)
    _add(ray, RAY_ADDRESS=f"{'127.0.0.1' if is_head else service}:{GCS_PORT}", RAY_USAGE_STATS_KUBERAY_IN_USE="1")
    _probe(ray, job["spec"]["rayClusterSpec"].get("rayVersion", ""), is_head)
    return {"apiVersion": "v1", "kind": "Pod", **template}


def ray_start(group: Object, resources: Object, is_head: bool, service: str) -> str:
    """Return the command line of Ray (generateRayStartCommand)."""
    parameters = dict(group.get("rayStartParams") or {})
    limits = {key: int(value) for key, value in (resources.get("limits") or {}).items() if str(value).isdecimal()}
    own = {name.casefold(): value for name, value in (group.get("resources") or {}).items()}
    if own.get("cpu"):
        parameters["num-cpus"] = own["cpu"]
    if "cpu" in limits:
        parameters.setdefault("num-cpus", str(limits["cpu"]))
    gpus = next((count for resource, count in sorted(limits.items()) if resource.endswith("gpu")), 0)
    if gpus:
        parameters.setdefault("num-gpus", str(gpus))
    parameters |= {"block": "true", "metrics-export-port": "8080", "dashboard-agent-listen-port": str(AGENT_PORT)}
    parameters |= {"dashboard-host": "0.0.0.0"} if is_head else {"address": f"{service}:{GCS_PORT}"}
    flags = (f"--{key}" if value == "true" else f"--{key}={value}" for key, value in sorted(parameters.items()))
    return f"ray start {'--head ' if is_head else ''} {'  '.join(flags)} "


def _wait_for_gcs(ray: Object, service: str) -> Object:
    resources = {"cpu": "200m", "memory": "256Mi"}
    return {
        "name": "wait-gcs-ready",
        **{key: copy.deepcopy(ray[key]) for key in ("image", "securityContext", "env", "volumeMounts") if key in ray},
        "command": COMMAND,
        "args": [f"until ray health-check --address {service}:{GCS_PORT}; do sleep 5; done"],
        "resources": {"limits": resources, "requests": resources},
    }


def _share_memory(spec: Object, ray: Object) -> None:
    limit = ((ray.get("resources") or {}).get("limits") or {}).get("memory")
    memory = {"medium": "Memory", **({"sizeLimit": limit} if limit else {})}
    spec["volumes"] = [*(spec.get("volumes") or ()), {"name": "shared-mem", "emptyDir": memory}]
    ray["volumeMounts"] = [*(ray.get("volumeMounts") or ()), {"name": "shared-mem", "mountPath": "/dev/shm"}]


def _probe(ray: Object, version: str, is_head: bool) -> None:
    url = f"http://localhost:{AGENT_PORT}/api/local_raylet_healthz"
    over_http: Object = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
    by_shell = {"exec": {"command": ["bash", "-c", f"wget --tries 1 -T 2 -q -O- {url} | grep success"]}}
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    action = over_http if numbers >= HTTP_PROBES else by_shell
    times = {"timeoutSeconds": 5 if is_head else 2, "periodSeconds": 5, "successThreshold": 1}
    ray.setdefault("livenessProbe", action | times | {"initialDelaySeconds": 30, "failureThreshold": 120})
    ray.setdefault("readinessProbe", action | times | {"initialDelaySeconds": 10, "failureThreshold": 10})


def _add(container: Object, **variables: str) -> None:
    env = container.setdefault("env", [])
    env += [{"name": name, "value": value} for name, value in variables.items()]
