"""The RayJob of one attempt: made from a template of the operator's, and read when it has ended.

An engineer writes the template (`--kube-template`, the YAML of one `ray.io/v1` RayJob) and sizes in it what a run gets:
images, CPUs, memory, volumes, service account, tolerations, `preRunningDeadlineSeconds`. It must have
`spec.rayClusterSpec` with a head group and a worker group `workers`; it may have a second group `gpu-workers`, which
then is that of runs with `use_gpu`. Of both only the first container's resources count as the worker's.

Filled in, whatever the template says:

    metadata.name                   r-<12 hex>-a<attempt>, as Ray Jobs are called; the Ray job has the same id
    metadata.labels                 app.kubernetes.io/managed-by: genmodels, genmodels/job, genmodels/model,
                                    genmodels/attempt (a value beyond 63 characters is cut and ends in its hash)
    metadata.annotations            genmodels/run, the readable job/model; genmodels/attempt
    pod templates                   label genmodels/rayjob: <name>, by which an attempt's pods are found
    spec.entrypoint, spec.jobId     the driver's command
    spec.submissionMode             HTTPMode: the operator submits. K8sJobMode would pull the image for one more pod per
                                    attempt, and try again by itself (submitterConfig) where the dispatcher should
    spec.backoffLimit               0: the dispatcher alone tries again
    spec.shutdownAfterJobFinishes   true, and ttlSecondsAfterFinished 0: the cluster goes at once. How it ended stays in
                                    the RayJob, which the dispatcher deletes KEEP_SECONDS later
    one worker group                replicas, minReplicas, maxReplicas: the workers; no other group; no autoscaling
    rayStartParams.num-cpus         head "0", workers "1": one worker of the training per pod, whatever its CPUs
    nvidia.com/gpu: 1               in the worker's requests and limits where the spec says `use_gpu`, unless the group
                                    asks for a GPU itself
    spec.preRunningDeadlineSeconds  1800, where the template has none: nodes that never come end an attempt
    spec.suspend, kueue.x-k8s.io/*  with --kube-queue: made suspended, for Kueue to admit

With --kube-cluster-selector the Ray job goes to a RayCluster that is there: no cluster is made, and a template is not
needed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genmodels.errors import GenmodelsError
from services.backends import driver_command, submission_id

API_VERSION = "ray.io/v1"
MANAGED_BY = {"app.kubernetes.io/managed-by": "genmodels"}
POD_LABEL = "genmodels/rayjob"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
WORKERS, GPU_WORKERS = "workers", "gpu-workers"
PLACED_SECONDS = 1800
LABEL_LENGTH = 63


@dataclass(frozen=True)
class KubeOptions:
    """What the `--kube-*` flags say. `priorities`: (WorkloadPriorityClass, lowest priority of a spec that gets it)."""

    namespace: str | None = None
    template: Path | None = None
    cluster: str | None = None
    queue: str | None = None
    priorities: Sequence[tuple[str, int]] = field(default=())

    @classmethod
    def of(cls, options: argparse.Namespace) -> KubeOptions:
        """Raises:
        GenmodelsError: flags that do not go together.
        """
        if options.kube_queue and options.kube_cluster_selector:
            raise GenmodelsError("--kube-queue does not go with --kube-cluster-selector: Kueue admits whole clusters")
        if options.kube_queue and (options.max_cpus or options.max_gpus):
            raise GenmodelsError("--max-cpus and --max-gpus do not go with --kube-queue: Kueue alone admits")
        if options.max_gpus and not options.max_cpus:
            raise GenmodelsError("--max-gpus needs --max-cpus with --backend kuberay: each worker has a CPU, too")
        if not options.kube_template and not options.kube_cluster_selector:
            raise GenmodelsError("--backend kuberay needs --kube-template, or --kube-cluster-selector")
        template = Path(options.kube_template) if options.kube_template else None
        priorities = tuple(_priority(text) for text in options.kube_priority)
        if priorities and not options.kube_queue:
            raise GenmodelsError("--kube-priority needs --kube-queue: Kueue's classes mean nothing without it")
        return cls(options.kube_namespace, template, options.kube_cluster_selector, options.kube_queue, priorities)


def add_kube_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `--backend kuberay`, each also an environment variable."""

    def add(name: str, help: str, **more: Any) -> None:
        variable = f"GENMODELS_{name.upper().replace('-', '_')}"
        parser.add_argument(f"--{name}", default=os.environ.get(variable) or None, help=f"{help} ({variable})", **more)

    add("kube-namespace", "where RayJobs are made; default: the service account's own", metavar="NAME")
    add("kube-template", "YAML of a RayJob to fill in; see services/rayjob.py", metavar="FILE")
    add("kube-cluster-selector", "have this RayCluster run all drivers, in place of a cluster per run", metavar="NAME")
    add("kube-queue", "LocalQueue of Kueue, which then alone admits", metavar="NAME")
    parser.add_argument(
        "--kube-priority",
        action="append",
        default=[each for each in os.environ.get("GENMODELS_KUBE_PRIORITY", "").split(",") if each],
        metavar="CLASS=NUMBER",
        help="WorkloadPriorityClass of specs with a priority from NUMBER on; again for each class"
        " (GENMODELS_KUBE_PRIORITY, with commas between them)",
    )


def _priority(text: str) -> tuple[str, int]:
    name, sign, number = text.strip().rpartition("=")
    if not (name and sign and re.fullmatch(r"-?\d+", number)):
        raise GenmodelsError(f"--kube-priority must be CLASS=NUMBER, e.g. genmodels-high=10, not {text!r}")
    return name, int(number)
