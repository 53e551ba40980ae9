"""Read what the status of a RayJob tells: its state, and how it ended (KubeRay 1.7)."""

from __future__ import annotations

import signal

from services.dispatch.backends.base import LOST, REFUSED
from services.dispatch.backends.messages import short
from services.dispatch.backends.rayjob import RayJob

FAILED = 1  # exit code that always counts; LOST counts only if training had begun
ENDED_STATES = ("Complete", "Failed", "ValidationFailed")
DRIVER_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
REASONS = {
    "AppFailed": (FAILED, "the driver died"),
    "ValidationFailed": (REFUSED, "KubeRay refuses the RayJob"),
    "SubmissionFailed": (LOST, "the driver could not be submitted"),
    "DeadlineExceeded": (LOST, "it took longer than the template's activeDeadlineSeconds"),
    "PreRunningDeadlineExceeded": (LOST, "its cluster was not there in time: no room for its pods, or no image"),
    "JobStatusCheckTimeoutExceeded": (LOST, "its head pod was lost"),
    "JobDeploymentStatusTransitionGracePeriodExceeded": (LOST, "KubeRay lost sight of the driver"),
}


def state_of(job: RayJob) -> str:
    return (job.get("status") or {}).get("jobDeploymentStatus") or ""


def created(job: RayJob) -> tuple[str, str]:
    return job["metadata"]["creationTimestamp"], job["metadata"]["name"]


def is_going(job: RayJob) -> bool:
    return "deletionTimestamp" in job["metadata"]


def end_of(status: RayJob) -> tuple[int, str]:
    """Return the code and the reason of a RayJob that has ended."""
    match status.get("jobDeploymentStatus"), status.get("jobStatus"):
        case "Complete", "SUCCEEDED":
            return 0, "the driver ended with code 0 and left no result"
        case "Complete", "STOPPED":
            return -signal.SIGTERM, "the driver was stopped"
    why, message = status.get("reason") or "Failed", short(status.get("message") or "")
    code, meaning = REASONS.get(why, (FAILED, "the driver failed"))
    return code, f"{meaning} ({why}: {message})" if message else f"{meaning} ({why})"
