"""Make the RayJob of one attempt from the operator's template.

An engineer writes the template, one `ray.io/v1` RayJob: an object in the cluster (`--kube-template-object`; it is
suspended, so that the operator makes no cluster of it, and is read again at each start) or a file (`--kube-template`).
The template sets the pods of a run: images, CPUs, memory, volumes, service account, tolerations,
`preRunningDeadlineSeconds`. It must have `spec.rayClusterSpec` with a head group and a worker group `workers`. It may
have a second group `gpu-workers`, which runs with `use_gpu` then use. In both groups only the resources of the first
container count as the worker's; its memory limit is that with which a submission is checked.

These fields are filled in and override the template:

    metadata.name                   r-<12 hex>-a<attempt>, like the ids of Ray Jobs; the Ray job has the same id
    metadata.labels                 app.kubernetes.io/managed-by: genmodels, genmodels/job, genmodels/model,
                                    genmodels/attempt (a value beyond 63 characters is cut and ends in its hash)
    metadata.annotations            genmodels/run, the readable job/model; genmodels/attempt. Of a template that is an
                                    object, no label and no annotation: they belong to the tool that applied it
    pod templates                   label genmodels/rayjob: <name>, the selector of an attempt's pods
    spec.entrypoint, spec.jobId     the driver's command; it publishes in a worker's pod, as the head's is small
    spec.submissionMode             HTTPMode: the operator submits. K8sJobMode would pull the image for one more pod per
                                    attempt, and would retry (submitterConfig), which is the dispatcher's task
    spec.backoffLimit               0: the dispatcher alone tries again
    spec.shutdownAfterJobFinishes   true, and ttlSecondsAfterFinished 0: the cluster is removed at once. The RayJob
                                    keeps its result; the dispatcher deletes it KEEP_SECONDS later
    one worker group                replicas, minReplicas, maxReplicas: the pods; no other group; no autoscaling
    rayStartParams.num-cpus         head "0", workers: the workers of a pod (1 without GPUs), whatever its CPUs.
                                    In a group with `resources`, KubeRay refuses num-cpus: there resources.CPU has this
                                    value, unless the template sets it
    nvidia.com/gpu                  of the worker's requests and limits if the spec sets `use_gpu`. A group that
                                    requests none gets 1. A group that requests more, e.g. 8 with NVLink, gets a worker
                                    for each, on as few pods as that takes; a pod requests as many GPUs as it has
                                    workers. Another resource that ends in /gpu counts as well
    lifecycle.preStop               of the first container, unless it has one: services.train.pre_stop, with which the
                                    run saves before the pod ends. terminationGracePeriodSeconds: 120 if the template
                                    has none; the run may take 20 seconds less (half, if it is below 40) to save, and so
                                    may the driver of a deleted RayJob (RAY_JOB_STOP_WAIT_TIME_S). Ray's own wait after
                                    the hook (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S) is 0
    spec.preRunningDeadlineSeconds  1800 if the template has none: an attempt ends if its nodes never come
    spec.suspend, kueue.x-k8s.io/*  with --kube-queue: created suspended; Kueue admits it. Else not suspended

With --kube-cluster-selector the Ray job goes to an existing RayCluster: no cluster is made, and no template is needed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genmodels.errors import GenmodelsError
from genmodels.spec.sections import ModelSpec
from services.dispatch.backends.base import driver_command, pre_stop_command, submission_id
from services.dispatch.backends.rayjob_pods import WORKERS, in_image, save_first, size_cluster, worker_memory

RayJob = dict[str, Any]  # the custom resource, as the API has it

API_VERSION = "ray.io/v1"
PART_OF = {"app.kubernetes.io/part-of": "genmodels"}
MANAGED_BY = {"app.kubernetes.io/managed-by": "genmodels"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
PLACED_SECONDS = 1800
LABEL_LENGTH = 63


@dataclass(frozen=True)
class KubeOptions:
    """The `--kube-*` flags. `priorities`: (WorkloadPriorityClass, lowest priority of a spec that gets this class)."""

    namespace: str | None = None
    template: Path | None = None
    cluster: str | None = None
    queue: str | None = None
    priorities: Sequence[tuple[str, int]] = field(default=())
    template_object: str | None = None
    give_way_seconds: float = 300.0

    @classmethod
    def of(cls, options: argparse.Namespace) -> KubeOptions:
        """Return the options of parsed flags.

        Raises:
            GenmodelsError: flags that exclude each other, or a flag is missing.
        """
        if options.kube_queue and options.kube_cluster_selector:
            raise GenmodelsError("--kube-queue excludes --kube-cluster-selector: Kueue admits whole clusters")
        if options.kube_queue and (options.max_cpus or options.max_gpus):
            raise GenmodelsError("--kube-queue excludes --max-cpus and --max-gpus: only Kueue admits runs")
        if options.max_gpus and not options.max_cpus:
            raise GenmodelsError("--max-gpus needs --max-cpus with --backend kuberay: each worker has a CPU, too")
        if options.kube_template and options.kube_template_object:
            raise GenmodelsError("--kube-template excludes --kube-template-object: a run has one template")
        if not (options.kube_template or options.kube_template_object or options.kube_cluster_selector):
            raise GenmodelsError(
                "--backend kuberay needs --kube-template-object, --kube-template or --kube-cluster-selector"
            )
        template = Path(options.kube_template) if options.kube_template else None
        priorities = tuple(_priority(text) for text in options.kube_priority)
        if priorities and not options.kube_queue:
            raise GenmodelsError("--kube-priority needs --kube-queue: Kueue's classes mean nothing without it")
        return cls(
            options.kube_namespace,
            template,
            options.kube_cluster_selector,
            options.kube_queue,
            priorities,
            options.kube_template_object,
            options.kube_give_way_seconds,
        )


def add_kube_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `--backend kuberay`, each also an environment variable."""

    def add(name: str, help: str, **more: Any) -> None:
        variable = f"GENMODELS_{name.upper().replace('-', '_')}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable) or None, help=f"{help} ({variable})", **more)

    add("kube-namespace", "namespace of the RayJobs; default: that of the service account", metavar="NAME")
    add("kube-template-object", "a suspended RayJob of the namespace, to fill in at each start", metavar="NAME")
    add("kube-template", "YAML of a RayJob to fill in; see services/dispatch/backends/rayjob.py", metavar="FILE")
    add("kube-cluster-selector", "have this RayCluster run all drivers, in place of a cluster per run", metavar="NAME")
    add("kube-queue", "LocalQueue of Kueue; then only Kueue admits runs", metavar="NAME")
    parser.add_argument(
        "--kube-give-way-seconds",
        type=float,
        default=float(os.environ.get("GENMODELS_KUBE_GIVE_WAY_SECONDS") or KubeOptions.give_way_seconds),
        metavar="SECONDS",
        help="after which a run that has nodes for only a part of its pods gives them to an earlier run in the same"
        " state, without --kube-queue (GENMODELS_KUBE_GIVE_WAY_SECONDS; default: %(default)s)",
    )
    parser.add_argument(
        "--kube-priority",
        action="append",
        default=[each for each in os.environ.get("GENMODELS_KUBE_PRIORITY", "").split(",") if each],
        metavar="CLASS=NUMBER",
        help="WorkloadPriorityClass of specs with a priority from NUMBER on; again for each class"
        " (GENMODELS_KUBE_PRIORITY, with commas between them)",
    )


class Template:
    """The template of RayJobs."""

    def __init__(self, options: KubeOptions) -> None:
        """Read and check the template.

        Raises:
            GenmodelsError: the template cannot be read, or lacks a field that must be filled in.
        """
        self.options = options
        self.job = {} if options.template is None else _without_nulls(_read(options.template))
        if options.template:
            _check(self.job, f"--kube-template {options.template}")

    def use(self, job: RayJob) -> None:
        """Fill in this object of the cluster from now on.

        Raises:
            GenmodelsError: the object lacks a field that must be filled in.
        """
        job = _without_nulls(job)
        _check(job, f"the RayJob {self.options.template_object}")
        self.job = {"metadata": {"labels": dict(PART_OF)}, "spec": job["spec"]}

    def worker_memory(self, use_gpu: bool) -> int | None:
        """Return the bytes of memory of a worker's pod; None if they are not known."""
        cluster = (self.job.get("spec") or {}).get("rayClusterSpec")
        return worker_memory(cluster, use_gpu) if cluster and not self.options.cluster else None

    def fill(self, storage_url: str, job: str, spec: ModelSpec, attempt: int, workers: int, priority: int) -> RayJob:
        """Return the RayJob of one attempt."""
        name, model = submission_id(job, spec.name, attempt), spec.name
        filled = copy.deepcopy(self.job)
        body = filled.setdefault("spec", {})
        metadata = filled.setdefault("metadata", {})
        metadata["name"] = name
        names = {"genmodels/job": label(job), "genmodels/model": label(model), "genmodels/attempt": str(attempt)}
        metadata["labels"] = {**(metadata.get("labels") or {}), **MANAGED_BY, **names, **self._queued(priority)}
        readable = {"genmodels/run": f"{job}/{model}", "genmodels/attempt": str(attempt)}
        metadata["annotations"] = {**(metadata.get("annotations") or {}), **readable}
        command = driver_command(storage_url, job, model, attempt, workers)
        body |= {
            "entrypoint": shlex.join(in_image(command)),
            "jobId": name,
            "submissionMode": "HTTPMode",
            "backoffLimit": 0,
        }
        if self.options.cluster:
            body["clusterSelector"] = {"ray.io/cluster": self.options.cluster}
            for field_of_clusters in ("rayClusterSpec", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"):
                body.pop(field_of_clusters, None)
        else:
            body |= {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 0}
            body["entrypoint"] += " --publish-on-worker"  # the head has no CPU of Ray, and little memory
            size_cluster(body["rayClusterSpec"], name, workers, spec.scaling.use_gpu)
            save_first(body["rayClusterSpec"], pre_stop_command(storage_url, job, model, attempt))
        body.setdefault("preRunningDeadlineSeconds", PLACED_SECONDS)
        body["suspend"] = bool(self.options.queue)
        return {**filled, "apiVersion": API_VERSION, "kind": "RayJob"}

    def _queued(self, priority: int) -> dict[str, str]:
        if not self.options.queue:
            return {}
        labels = {QUEUE_LABEL: self.options.queue}
        classes = sorted(self.options.priorities, key=lambda each: each[1])
        fitting = [name for name, lowest in classes if lowest <= priority] or [name for name, _ in classes[:1]]
        return labels | ({PRIORITY_LABEL: fitting[-1]} if fitting else {})


def label(text: str) -> str:
    """Return `text` as a label's value, which has at most 63 characters."""
    if len(text) <= LABEL_LENGTH:
        return text
    return f"{text[:50]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _priority(text: str) -> tuple[str, int]:
    name, sign, number = text.strip().rpartition("=")
    if not (name and sign and re.fullmatch(r"-?\d+", number)):
        raise GenmodelsError(f"--kube-priority must be CLASS=NUMBER, e.g. genmodels-high=10, not {text!r}")
    return name, int(number)


def _read(path: Path) -> RayJob:
    try:
        # through JSON, which has no anchors: a value filled in at one place must not appear at another
        template = json.loads(json.dumps(yaml.safe_load(path.read_text())))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise GenmodelsError(f"--kube-template {path} cannot be read: {error}") from None
    if not isinstance(template, dict) or (template.get("apiVersion"), template.get("kind")) != (API_VERSION, "RayJob"):
        raise GenmodelsError(f"--kube-template {path} must be one RayJob of {API_VERSION}")
    return template


def _without_nulls(node: Any) -> Any:
    """Return a copy without the fields that are null, which are not set: e.g. `env:` whose lines are comments."""
    if isinstance(node, dict):
        return {name: _without_nulls(value) for name, value in node.items() if value is not None}
    return [_without_nulls(each) for each in node] if isinstance(node, list) else node


def _check(job: RayJob, source: str) -> None:
    """Raise GenmodelsError if a field that must be filled in is missing."""
    try:
        cluster = job["spec"]["rayClusterSpec"]
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        for pods in (cluster["headGroupSpec"], groups[WORKERS], *groups.values()):
            _ = pods["template"]["spec"]["containers"][0]["image"]
    except (KeyError, IndexError, TypeError) as error:
        raise GenmodelsError(
            f"{source} lacks {error}: it needs spec.rayClusterSpec with a headGroupSpec, and a worker"
            f" group {WORKERS!r}, each with a pod template and an image"
        ) from None
