"""Act as the KubeRay operator, and as Kueue, on a fake Kubernetes API.

The operator refuses specs as KubeRay's validation.go does, and moves status as its rayjob_controller.go does in
HTTPMode (both of v1.7.0); a test supplies the drivers. Its pods are those that KubeRay builds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.support.fake_kubernetes import KubeApi, Object, groups_of
from tests.support.kuberay_pods import build_pods

FINALIZER = "ray.io/rayjob-finalizer"  # by which KubeRay stops the driver


class Operator:
    """Act as KubeRay and Kueue: each `reconcile` moves every RayJob one step further.

    Args:
        driver: starts the driver of a RayJob; the result has `poll` and `kill`, as a process has.

    Attributes:
        admits: whether Kueue resumes the jobs in its queue.
        placed: whether pods start.
        nodes: pods that have room; None: all. In each round each run gets a node for one pod more.
        pending: status of pods that do not start.
        conditions: of a RayCluster whose pods do not start.
        clings: whether pods stay when their cluster is deleted: in their grace period, or on a node that is lost.
    """

    def __init__(self, api: KubeApi, driver: Callable[[Object], Any]) -> None:
        self.api, self.driver = api, driver
        self.drivers: dict[str, Any] = {}
        self.clusters: set[str] = set()  # RayJobs whose RayCluster exists
        self.started: list[tuple[str, str]] = []  # name of the RayJob and of the head pod, of each start of a driver
        self.admits = self.placed = True
        self.pending: Object = {"phase": "Pending"}
        self.conditions: list[Object] = []
        self.clings = False
        self.nodes: int | None = None
        self.heads = 0

    def reconcile(self) -> None:
        with self.api.lock:
            for name in list(self.api.jobs):
                self._step(name, self.api.jobs[name])

    def preempt(self, name: str) -> None:
        with self.api.lock:
            self.api.jobs[name]["spec"]["suspend"] = True
            self.api.touch(self.api.jobs[name])

    def lose_head(self, name: str) -> None:
        """Evict the head pod; KubeRay makes a new one, which does not know the driver, and submits the driver there."""
        with self.api.lock:
            self._stop(name)
            self._make_pods(name)
            self._start(name)

    def close(self) -> None:
        for name in list(self.drivers):
            self._stop(name)

    def _step(self, name: str, job: Object) -> None:
        spec, status = job["spec"], job.get("status") or {}
        if "deletionTimestamp" in job["metadata"]:
            self._stop(name)
            finalizers = job["metadata"].get("finalizers") or []
            job["metadata"]["finalizers"] = [each for each in finalizers if each != FINALIZER]
            self.api.collect(name)
            return
        if problem := refusal(job):
            self.api.status(name, jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message=problem)
            return
        match status.get("jobDeploymentStatus", ""):
            case "":
                job["metadata"].setdefault("finalizers", []).append(FINALIZER)
                cluster = f"{name}-abcde"
                self.api.status(
                    name, jobDeploymentStatus="Initializing", jobId=spec.get("jobId", name), rayClusterName=cluster
                )
            case "Initializing" | "Running" if spec.get("suspend"):
                self.api.status(name, jobDeploymentStatus="Suspending")
            case "Initializing":
                self._initialize(name)
            case "Running":
                self._watch(name)
            case "Suspending" if name in self.clusters:
                self._stop(name)
            case "Suspending":  # the RayCluster is gone; its pods may not be
                job["status"] = {"jobDeploymentStatus": "Suspended"}
                self.api.touch(job)
            case "Suspended":
                if self.admits and "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]:
                    spec["suspend"] = False
                if not spec["suspend"]:
                    self.api.status(name, jobDeploymentStatus="")
            case "Complete" | "Failed" if not spec.get("clusterSelector"):  # shutdownAfterJobFinishes
                self._stop(name)

    def _initialize(self, name: str) -> None:
        if name not in self.clusters:
            self._make_pods(name)
        if self.placed and (self.nodes is None or self._schedule(name)):
            self._start(name)
        else:
            self.api.status(name, rayClusterStatus={"conditions": self.conditions})

    def _schedule(self, name: str) -> bool:
        """Give one pod a node, if there is room; return True if all pods of this RayJob have nodes."""
        mine = [self.api.pods[pod] for pod in self.api.pods_of(name)]
        waiting = [pod for pod in mine if pod["status"] is self.pending]
        if waiting and sum(pod["status"] is not self.pending for pod in self.api.pods.values()) < (self.nodes or 0):
            waiting.pop()["status"] = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "True"}]}
        return not waiting

    def _make_pods(self, name: str) -> None:
        self.clusters.add(name)
        self.heads += 1
        job = self.api.jobs[name]
        for i, pod in enumerate(build_pods(job) if "rayClusterSpec" in job["spec"] else ()):
            pod["metadata"]["name"] = f"{name}-head-{self.heads}" if i == 0 else f"{name}-worker-{self.heads}-{i}"
            pod["status"] = self.pending
            self.api.pods[pod["metadata"]["name"]] = pod

    def _start(self, name: str) -> None:
        """Start the pods, and the driver in the head's."""
        for pod in self.api.pods_of(name):
            self.api.pods[pod]["status"] = {"phase": "Running"}
        head = f"{name}-head-{self.heads}"
        self.drivers[name] = self.driver(self.api.jobs[name])
        self.started.append((name, head))
        cluster = {"head": {"podName": head}}
        self.api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterStatus=cluster)

    def _watch(self, name: str) -> None:
        code = self.drivers[name].poll()
        if code is None:
            return
        if code == 0:
            self.api.status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        else:
            message = f"Job entrypoint command failed with exit code {code}, last available logs:\nTraceback ..."
            self.api.status(name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message=message)
        self._stop(name)

    def _stop(self, name: str) -> None:
        """Delete the RayCluster. Its pods end, and with them the driver."""
        self.clusters.discard(name)
        if driver := self.drivers.pop(name, None):
            driver.kill()
        for pod in self.api.pods_of(name) if not self.clings else ():
            del self.api.pods[pod]


def refusal(job: Object) -> str:
    """Return why KubeRay refuses a RayJob (ValidateRayJobMetadata, ValidateRayJobSpec, ValidateRayJobStatus)."""
    name, spec = job["metadata"]["name"], job["spec"]
    if len(name) > 47:
        return "The RayJob metadata is invalid: RayJob name should be no more than 47 characters"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        return "The RayJob metadata is invalid: RayJob name should be a valid DNS1035 label"
    invalid = "The RayJob spec is invalid: "
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        return f"{invalid}a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if spec.get("suspend") and spec.get("clusterSelector"):
        return f"{invalid}the ClusterSelector mode doesn't support the suspend operation"
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        return f"{invalid}one of RayClusterSpec or ClusterSelector must be set"
    if spec.get("clusterSelector") and spec.get("backoffLimit"):
        return f"{invalid}BackoffLimit is incompatible with ClusterSelector mode"
    for group in groups_of(spec):
        title = group.get("groupName", "Head")
        in_start = {"num-cpus", "num-gpus", "memory", "resources"} & (group.get("rayStartParams") or {}).keys()
        if in_start and group.get("resources"):
            return (
                f"{invalid}resource fields should not be set in both rayStartParams and Resources for {title} group;"
                " please use only one"
            )
    if (job.get("status") or {}).get("jobDeploymentStatus") == "Waiting":
        return "The RayJob status is invalid: JobDeploymentStatus cannot be `Waiting` when SubmissionMode is not ..."
    return ""
