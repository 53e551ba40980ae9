"""Drivers as RayJobs on Kubernetes: KubeRay makes a cluster for each attempt, or gives it to one that is there.

What becomes of a RayJob (KubeRay 1.7, Kueue 0.19), and what the dispatcher makes of it. A driver's own result, where it
left one, comes first; "counted" are attempts without a new checkpoint, of which three in a row end a run.

    RayJob                                    | the run
    ------------------------------------------|-------------------------------------------------------------------------
    suspended by Kueue, never begun           | starting: waits for Kueue to admit it, however long
    no status, Initializing, Waiting          | starting: waits for its cluster; for ever where no KubeRay runs
    Running                                   | starting, running, publishing: as the driver's heartbeats say
    Complete, jobStatus SUCCEEDED             | what the result says; without one: tried again, counted
    Complete, jobStatus STOPPED               | it was stopped by hand: tried again, counted
    Failed, AppFailed                         | the driver died: what the result says, else tried again, counted
    Failed, PreRunningDeadlineExceeded        | no room for its pods, or no image: tried again, not counted
    Failed, DeadlineExceeded                  | activeDeadlineSeconds of the template: goes on in a new attempt
    Failed, JobStatusCheckTimeoutExceeded     | the head is lost: tried again, counted once training had begun
    Failed, SubmissionFailed                  | tried again, counted once training had begun
    Failed, ValidationFailed; refused (422)   | the template is wrong: tried again, counted, so the run soon fails
    the head pod is replaced                  | the head is lost (HTTPMode would submit the driver again): as above
    Suspending, Suspended, had begun          | preempted: its RayJob is deleted, a new attempt queued; not counted
    deleted by hand                           | tried again, counted once training had begun
    Retrying                                  | cannot be (backoffLimit 0); start.json lets no attempt start twice
    unreachable API server, 401, 403, 429, 5xx| nothing is known, nothing changes: runs go on, none starts

The fence: an attempt has ended when its driver has (jobStatus is terminal), or when its RayJob and all its pods are
gone. KubeRay fails RayJobs whose driver still runs (a deadline): these are deleted first, in the foreground. A
preempted attempt is not resumed by Kueue but followed by a new one, whose RayJob queues anew with the run's priority.

Pods that are taken away (preempted, evicted) save nothing on their way: what is lost are the steps since the latest
checkpoint. With --kube-cluster-selector a driver's pods are the cluster's and stay: there a RayJob that is gone has
ended, and the store's fence keeps what a late driver still writes out of the run.

With --kube-queue, or without --max-cpus, there is always room: runs start at once with the fewest workers they may
have, and neither grow nor make room; Kueue, or the nodes' autoscaler, decides. With --max-cpus the dispatcher plans
with that many, as on any cluster. An ended RayJob is deleted KEEP_SECONDS after its end was seen.
"""

from __future__ import annotations

import logging
import signal
import time

from genmodels.runs.jobs import Jobs
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.dispatch.backends.base import LOST, PREEMPTED, Capacity, Driver, submission_id
from services.dispatch.backends.kube_api import KubeApi
from services.dispatch.backends.ray_jobs import ACCEPT_SECONDS
from services.dispatch.backends.rayjob import KubeOptions, RayJob, Template

KEEP_SECONDS = 300.0  # an ended RayJob stays to be looked at
GONE_SECONDS = 300.0  # for the pods of a deleted RayJob: those of a node that is lost may never go
FAILED = 1  # the code of what counts, against LOST, which does not where no training had begun
MESSAGE = 300  # characters of KubeRay's message in a reason
LOG = 2000  # characters of it in the log: it ends with the last lines of the driver's
DRIVER_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
REASONS = {
    "AppFailed": (FAILED, "the driver died"),
    "ValidationFailed": (FAILED, "KubeRay refuses the RayJob"),
    "SubmissionFailed": (LOST, "the driver could not be submitted"),
    "DeadlineExceeded": (LOST, "it took longer than the template's activeDeadlineSeconds"),
    "PreRunningDeadlineExceeded": (LOST, "its cluster was not there in time: no room for its pods, or no image"),
    "JobStatusCheckTimeoutExceeded": (LOST, "its head pod was lost"),
    "JobDeploymentStatusTransitionGracePeriodExceeded": (LOST, "KubeRay lost sight of the driver"),
}

log = logging.getLogger("genmodels.kuberay")


class KubeRayBackend:
    """No call raises for an API server that is away: what cannot be known is None.

    Raises:
        GenmodelsError: no client, no cluster, or a template that cannot be used.
    """

    def __init__(self, storage: Storage, options: KubeOptions, most: Capacity) -> None:
        """Args:
        most: CPUs and GPUs that runs may have together; no CPUs: no limit.
        """
        self.storage, self.template = storage, Template(options)
        self.api = KubeApi(options.namespace)
        self.most = Capacity(0, 0, unlimited=True) if options.queue or not most.cpus else most
        self._ended: dict[str, float] = {}  # RayJobs, and when they were first seen ended

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        spec = Jobs(self.storage).spec(job)
        body = self.template.fill(storage_url, job, spec.model(model), attempt, workers, spec.priority)
        return _RayJob(self, Run(self.storage, job, model), attempt, body)

    def find(self, job: str, model: str, attempt: int) -> Driver:
        return _RayJob(self, Run(self.storage, job, model), attempt)

    def capacity(self) -> Capacity | None:
        jobs = self.api.jobs()
        if jobs is None:
            return None
        self._sweep(jobs)
        return self.most

    def _sweep(self, jobs: dict[str, RayJob]) -> None:
        """Delete what ended a while ago; its result was read long since."""
        now = time.monotonic()
        ended = [name for name, job in jobs.items() if _state(job) in ("Complete", "Failed")]
        self._ended = {name: self._ended.get(name, now) for name in ended}
        for name, since in self._ended.items():
            if now - since >= KEEP_SECONDS and not _is_going(jobs[name]):
                self.api.delete(name)


class _RayJob(Driver):
    """The RayJob of one attempt. What was asked for and not answered (to make, to delete) is asked again at each poll.

    `code` and `reason` are what it ends with once that is known for certain; until then `poll` is None.
    """

    def __init__(self, backend: KubeRayBackend, run: Run, attempt: int, body: RayJob | None = None) -> None:
        self.api, self.run, self.attempt = backend.api, run, attempt
        self.name = submission_id(run.job, run.model, attempt)
        self.body, self.deadline = body, time.monotonic() + ACCEPT_SECONDS  # what to make, as long as it is not there
        self.queue = backend.template.options.queue
        self.code, self.ended = LOST, False
        self.deleting = self.seen = False
        self.gone_since: float | None = None
        self.never_began = False  # known for certain while it is suspended
        self.head = ""
        self._create()

    def poll(self) -> int | None:
        if not self.ended and (jobs := self.api.jobs()) is not None:
            job = jobs.get(self.name)
            self.ended = self._is_missing() if job is None else self._look(job)
        return self.code if self.ended else None

    def kill(self) -> None:
        """`poll` tells when it and its pods are gone."""
        self._end_by_deleting(-signal.SIGKILL, "")

    # Each of these is about to end the attempt for good where it returns True.

    def _look(self, job: RayJob) -> bool:
        self.body, self.seen = None, True
        if _is_going(job):
            if not self.deleting:
                self._end_by_deleting(LOST, "its RayJob was deleted", ask=False)
            return False
        if self.deleting:
            self.api.delete(self.name)
            return False
        status, queued = job.get("status") or {}, bool(self.queue and job["spec"].get("suspend"))
        match _state(job):
            case "Complete" | "Failed":
                return self._has_ended(status)
            case "Running":
                self.waiting, self.never_began = "", False
                self._watch_head(status)
            case "Suspending" | "Suspended" if self._had_begun():
                self.waiting = "is suspended: its pods end"
                if _state(job) == "Suspended":
                    why = "preempted: Kueue suspended it" if self.queue else "it was suspended"
                    self._end_by_deleting(PREEMPTED, why)
            case _ if queued:
                self.waiting = f"waits for Kueue to admit it to queue {self.queue}"
            case "Suspended":
                self.waiting = "is suspended"
            case _:
                self.waiting, self.never_began = "waits for KubeRay to make its cluster", False
        return False

    def _has_ended(self, status: RayJob) -> bool:
        code, reason = _end(status)
        if code:
            log.warning("RayJob %s: %s\n%s", self.name, reason, (status.get("message") or "")[-LOG:])
        if status.get("jobStatus") in DRIVER_ENDED or not status.get("rayClusterName"):
            self.code, self.reason = code, reason
            return True
        self._end_by_deleting(code, reason)  # its driver may still run
        return False

    def _watch_head(self, status: RayJob) -> None:
        """KubeRay makes a new head pod, and in HTTPMode submits the driver to it once more."""
        head = ((status.get("rayClusterStatus") or {}).get("head") or {}).get("podName") or ""
        if self.head and head and head != self.head:
            self._end_by_deleting(LOST, "its head pod was lost")
        self.head = head or self.head

    def _had_begun(self) -> bool:
        self.never_began = self.never_began or self.run.attempt_start(self.attempt) is None
        return not self.never_began

    def _is_missing(self) -> bool:
        if self.body is not None:
            return self._create()
        if not self.deleting:
            self._end_by_deleting(LOST, "its RayJob was deleted" if self.seen else "its RayJob is gone", ask=False)
        self.gone_since = self.gone_since or time.monotonic()
        pods = self.api.has_pods(self.name)
        if pods and time.monotonic() - self.gone_since > GONE_SECONDS:
            log.warning("RayJob %s is gone, and one of its pods is not: it is waited for no longer", self.name)
            return True
        return pods is False

    def _create(self) -> bool:
        if self.body is None:
            return False
        status, said = self.api.create(self.body)
        if status in (200, 201, 409):
            self.body = None
        elif status in (400, 404, 413, 422):
            self.ended, self.code, self.reason = True, FAILED, f"Kubernetes refuses the RayJob: {said}"
        elif status == 403:  # rights, or a quota
            self.waiting = f"Kubernetes does not take the RayJob: {said}"
        elif time.monotonic() > self.deadline:
            self._end_by_deleting(LOST, "Kubernetes did not take the RayJob")  # which it may have, and not said
        return self.ended

    def _end_by_deleting(self, code: int, reason: str, ask: bool = True) -> None:
        self.body, self.deleting = None, True
        self.code, self.reason, self.waiting = code, reason, "its pods end"
        if ask:
            self.api.delete(self.name)


def _state(job: RayJob) -> str:
    return (job.get("status") or {}).get("jobDeploymentStatus") or ""


def _is_going(job: RayJob) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _end(status: RayJob) -> tuple[int, str]:
    """The code and the reason of a RayJob that is Complete or Failed."""
    match status.get("jobDeploymentStatus"), status.get("jobStatus"):
        case "Complete", "SUCCEEDED":
            return 0, "the driver ended with code 0 and left no result"
        case "Complete", "STOPPED":
            return -signal.SIGTERM, "the driver was stopped"
    why, said = status.get("reason") or "Failed", (status.get("message") or "").strip().partition("\n")[0]
    code, meaning = REASONS.get(why, (FAILED, "the driver failed"))
    return code, f"{meaning} ({why}: {said[:MESSAGE]})" if said else f"{meaning} ({why})"
