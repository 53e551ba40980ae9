"""Fill in the pods of a RayJob: their number, what Ray may place in each, and the hook with which a run saves first."""

from __future__ import annotations

from typing import Any

POD_LABEL = "genmodels/rayjob"
WORKERS, GPU_WORKERS = "workers", "gpu-workers"
GRACE_SECONDS = 120  # for a pod to end; it saves first
RAYS_WAIT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DRIVERS_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # from SIGTERM to SIGKILL, when KubeRay stops the driver of a deleted RayJob
SIGTERM_SECONDS = 20  # of the grace period (half of one below 40), for Ray's processes to end after the run has saved


def size_cluster(cluster: dict[str, Any], name: str, workers: int, use_gpu: bool) -> None:
    """Reduce the cluster to one worker group, with as many pods as the workers need."""
    group = _group(cluster, use_gpu)
    count, workers_of_pod = _share_gpus(group, workers) if use_gpu else (workers, 1)
    group |= {"replicas": count, "minReplicas": count, "maxReplicas": count}
    cluster["workerGroupSpecs"] = [group]
    cluster.pop("enableInTreeAutoscaling", None)
    for pods, cpus in ((cluster["headGroupSpec"], "0"), (group, str(workers_of_pod))):
        parameters = pods["rayStartParams"] = dict(pods.get("rayStartParams") or {})
        if resources := pods.get("resources"):  # KubeRay refuses both; the CPUs are then in `resources`
            if not any(name.casefold() == "cpu" for name in resources):
                resources["CPU"] = cpus
        else:
            parameters["num-cpus"] = cpus
        metadata = pods["template"].setdefault("metadata", {})
        metadata["labels"] = {**(metadata.get("labels") or {}), POD_LABEL: name}


def worker_memory(cluster: dict[str, Any], use_gpu: bool) -> int | None:
    """Return the bytes of memory of a worker's pod: the limit of its first container; None: it has no limit."""
    from kubernetes.utils.quantity import parse_quantity

    resources = _group(cluster, use_gpu)["template"]["spec"]["containers"][0].get("resources") or {}
    try:
        return int(parse_quantity((resources.get("limits") or {})["memory"]))
    except (KeyError, ValueError):  # no limit; or not a quantity, which Kubernetes refuses at the start of a run
        return None


def _group(cluster: dict[str, Any], use_gpu: bool) -> dict[str, Any]:
    """Return the group of workers that a run uses."""
    groups: dict[str, dict[str, Any]] = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return groups.get(GPU_WORKERS, groups[WORKERS]) if use_gpu else groups[WORKERS]


def _share_gpus(group: dict[str, Any], workers: int) -> tuple[int, int]:
    """Return the number of pods and of workers in a pod, one for each GPU; request no more GPUs than these need."""
    resources = group["template"]["spec"]["containers"][0].setdefault("resources", {})
    limits, requests = resources.setdefault("limits", {}), resources.setdefault("requests", {})
    gpu = next((name for name in (*limits, *requests) if name.endswith("/gpu")), "nvidia.com/gpu")
    gpus_of_pod = int(limits.get(gpu) or requests.get(gpu) or 1)
    count = -(-workers // gpus_of_pod)
    limits[gpu] = requests[gpu] = workers_of_pod = -(-workers // count)
    return count, workers_of_pod


def save_first(cluster: dict[str, Any], command: list[str]) -> None:
    """Add the hook to each pod: whichever of them ends, the run saves before. Ray then ends without a further wait."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        grace = pod.setdefault("terminationGracePeriodSeconds", GRACE_SECONDS)
        seconds = str(max(grace - SIGTERM_SECONDS, grace // 2))
        hooks = pod["containers"][0].setdefault("lifecycle", {})
        hooks.setdefault("preStop", {"exec": {"command": [*in_image(command), "--seconds", seconds]}})
        env = pod["containers"][0].setdefault("env", [])
        own = {variable["name"] for variable in env}
        waits = {RAYS_WAIT: "0", DRIVERS_WAIT: seconds}
        env += [{"name": name, "value": value} for name, value in waits.items() if name not in own]


def in_image(command: list[str]) -> list[str]:
    """Return a command of this process's Python as one of the image's Python."""
    return ["python", *command[1:]]
