"""Tell why the pods of a run do not start: their image, their settings, no node with room, or a quota."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.dispatch.backends.messages import short

Pod = dict[str, Any]  # as the API has it

# Reasons for which a container waits; the kubelet's names
WRONG_IMAGE = ("InvalidImageName", "ErrImageNeverPull")
NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable")
NO_CONTAINER = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff")
# Answers of a registry that the next pull would get again. Another error (no answer, 429, 5xx) may end by itself.
FINAL_ANSWERS = re.compile(
    r"not ?found|manifest unknown|does not exist|unauthorized|forbidden|denied|no match for platform|no basic auth"
    r"|invalid reference",
    re.IGNORECASE,
)
# Parts of a message that change while its cause does not
COUNT = re.compile(r"^\d+ ")  # nodes
REFUSED_POD = re.compile(r'^pods "[^"]*" is forbidden: ')
USED = re.compile(r", used: .*?(?=, limited: )")


@dataclass(frozen=True)
class Obstacle:
    """A reason why pods do not start. `final`: each further attempt would have the same reason."""

    reason: str
    final: bool = False


def find_obstacle(pods: Sequence[Pod], cluster: dict[str, Any]) -> Obstacle | None:
    """Return the worst obstacle of the pods of a run.

    Args:
        pods: that have not started.
        cluster: status of their RayCluster.
    """
    obstacles = [obstacle for pod in pods if (obstacle := _obstacle(pod))]
    obstacles += [Obstacle(reason) for reason in [_refused_pod(cluster)] if reason]
    return max(obstacles, key=lambda obstacle: obstacle.final, default=None)


def is_partly_placed(pods: Sequence[Pod], cluster: dict[str, Any], total: int) -> bool:
    """Tell whether some pods of a run have nodes and others wait for nodes, or for a quota.

    Args:
        pods, cluster: as `find_obstacle` takes them.
        total: number of the run's pods.
    """
    waiting = sum(_unscheduled_condition(pod) is not None for pod in pods) + bool(_refused_pod(cluster))
    return 0 < waiting < total


def _obstacle(pod: Pod) -> Obstacle | None:
    status = pod.get("status") or {}
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = waiting.get("reason") or "", short(waiting.get("message") or "")
        image = f"the image {container.get('image')} cannot be pulled ({reason}: {message})"
        if reason in WRONG_IMAGE or (reason in NO_IMAGE and FINAL_ANSWERS.search(message)):
            return Obstacle(image, final=True)
        if reason in NO_IMAGE:
            return Obstacle(image)
        if reason in NO_CONTAINER:
            return Obstacle(f"the container {container.get('name')} does not start ({reason}: {message})")
    condition = _unscheduled_condition(pod)
    return Obstacle(_unscheduled(condition)) if condition else None


def _unscheduled_condition(pod: Pod) -> dict[str, Any] | None:
    conditions: list[dict[str, Any]] = (pod.get("status") or {}).get("conditions") or []
    unscheduled = (each for each in conditions if (each.get("type"), each.get("status")) == ("PodScheduled", "False"))
    return next(unscheduled, None)


def _unscheduled(condition: dict[str, Any]) -> str:
    """Return which resource or which property of the nodes is missing.

    The scheduler's message: `0/3 nodes are available: 1 Insufficient cpu, 2 node(s) had untolerated taint(s).
    preemption: 0/3 nodes are available: ...`. The numbers of nodes are left out: they change while nodes come and go.
    """
    reason, message = condition.get("reason") or "", condition.get("message") or ""
    if reason != "Unschedulable":  # SchedulingGated
        return f"waits to be scheduled ({reason}: {short(message)})"
    lacks = message.partition("available: ")[2].partition(". ")[0].rstrip(".")
    parts = {COUNT.sub("", part) for part in re.split(r", (?=\d+ )", lacks)}
    return f"waits for nodes with room (Unschedulable: {', '.join(sorted(parts)) if lacks else short(message)})"


def _refused_pod(cluster: dict[str, Any]) -> str:
    """Return why the API server refuses to create a pod, e.g. a quota; "" if it does not.

    KubeRay joins the name of the failure and the API server's message by a line break.
    """
    for condition in cluster.get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            message = (condition.get("message") or "").strip().rpartition("\n")[2]
            return f"a pod is refused ({short(USED.sub('', REFUSED_POD.sub('', message)))})"
    return ""
