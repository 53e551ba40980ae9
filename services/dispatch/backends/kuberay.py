"""Run drivers as RayJobs on Kubernetes: KubeRay makes a cluster for each attempt, or uses an existing cluster.

The table lists the states of a RayJob (KubeRay 1.7, Kueue 0.19) and what the dispatcher does in each. A driver's own
result, if it exists, comes first. A "counted" attempt has no new checkpoint; three such attempts in a row end a run.

    RayJob                                    | the run
    ------------------------------------------|-------------------------------------------------------------------------
    suspended by Kueue, never begun           | starting: waits for Kueue to admit it, without limit
    no status                                 | starting: waits for KubeRay, without limit: it takes no nodes
    Initializing                              | starting: waits for its cluster, and says what its pods wait for
    Initializing, with nodes for a part of its| without Kueue: after --kube-give-way-seconds its RayJob is deleted and a
    pods, like an earlier run                 | new attempt queued; not counted
    Initializing, an image that does not exist| fails with the kubelet's words
    Running                                   | starting, running, publishing: as the driver's heartbeats say
    Complete, jobStatus SUCCEEDED             | the result decides; without a result: tried again, counted
    Complete, jobStatus STOPPED               | it was stopped by hand: tried again, counted
    Failed, AppFailed                         | the driver died: the result decides, else tried again, counted
    Failed, PreRunningDeadlineExceeded        | no room for its pods, or no image: tried again, not counted
    Failed, DeadlineExceeded                  | activeDeadlineSeconds of the template: continues in a new attempt
    Failed, JobStatusCheckTimeoutExceeded     | the head is lost: tried again, counted if training had begun
    Failed, SubmissionFailed                  | tried again, counted if training had begun
    ValidationFailed; refused (400, 413, 422) | the template is wrong: fails with KubeRay's or Kubernetes's words
    the head pod is replaced                  | the head is lost (HTTPMode would submit the driver again): as above
    Suspending, Suspended, had begun          | preempted: its RayJob is deleted, a new attempt queued; not counted
    deleted by hand                           | tried again, counted if training had begun
    Retrying (cannot be: backoffLimit 0)      | its RayJob is deleted: tried again, counted if training had begun
    any other state                           | the reason names the state; the hang detection ends it
    unreachable API server, 401, 403, 429, 5xx| state unknown, nothing changes: runs continue, no run starts

The fence: an attempt has ended when its driver has ended (jobStatus is terminal), or when its RayJob and all its pods
are gone. KubeRay fails RayJobs whose driver still runs (a deadline): the dispatcher first deletes these, in the
foreground. Kueue does not resume a preempted attempt: a new attempt follows, and its RayJob queues again with the run's
priority.

Before a pod is preempted, evicted, drained or deleted, its hook (services.train.pre_stop) has the run save, within the
pod's grace period. With --kube-cluster-selector a driver's pods belong to the cluster and stay: there an attempt has
ended when its RayJob is gone, and the store's fence keeps the late writes of its driver out of the run.

With --kube-queue, or without --max-cpus, there is always room: runs start at once with the fewest workers that they
may have, and neither grow nor make room; Kueue or the nodes' autoscaler decides. With --max-cpus the dispatcher plans
with that many CPUs, as on any cluster. An ended RayJob is deleted KEEP_SECONDS after the dispatcher first saw its end.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from genmodels.errors import GenmodelsError
from genmodels.runs.jobs import Jobs
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.dispatch.backends.base import LOST, PREEMPTED, REFUSED, Backend, Capacity, Driver, submission_id
from services.dispatch.backends.kube_api import KubeApi
from services.dispatch.backends.messages import short
from services.dispatch.backends.pods import find_obstacle, is_partly_placed
from services.dispatch.backends.ray_jobs import ACCEPT_SECONDS
from services.dispatch.backends.rayjob import KubeOptions, RayJob, Template
from services.dispatch.backends.rayjob_status import (
    DRIVER_ENDED,
    ENDED_STATES,
    FAILED,
    created,
    end_of,
    is_going,
    state_of,
)

KEEP_SECONDS = 300.0  # an ended RayJob stays for inspection
TEMPLATE_SECONDS = 60.0  # after which the template is read again, also without a start: for the memory of workers
GONE_SECONDS = 300.0  # for the pods of a deleted RayJob: the pods of a lost node may stay for ever
REFUSAL = 1000  # characters of the API server's message in a reason: it names each wrong field
LOG = 2000  # characters of this message in the log; it ends with the last lines of the driver's log
log = logging.getLogger("genmodels.kuberay")


class KubeRayBackend(Backend):
    """Drivers as RayJobs. No call raises for an unreachable API server: an unknown value is None.

    Raises:
        GenmodelsError: no client, no cluster, or an unusable template.
    """

    def __init__(self, storage: Storage, options: KubeOptions, most: Capacity) -> None:
        """Args:
        most: CPUs and GPUs that runs may have together; no CPUs: no limit.
        """
        self.storage, self.template = storage, Template(options)
        self.api = KubeApi(options.namespace)
        self.most = Capacity(0, 0, unlimited=True) if options.queue or not most.cpus else most
        self.give_way_seconds = options.give_way_seconds
        self._template_read = -TEMPLATE_SECONDS
        self._ended: dict[str, float] = {}  # RayJob -> time at which its end was first seen

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Driver:
        spec = Jobs(self.storage).spec(job)
        fill = partial(self.template.fill, storage_url, job, spec.model(model), attempt, workers, spec.priority)
        return _RayJob(self, Run(self.storage, job, model), attempt, fill)

    def find(self, job: str, model: str, attempt: int) -> Driver:
        return _RayJob(self, Run(self.storage, job, model), attempt)

    def create(self, fill: Callable[[], RayJob]) -> tuple[int, str]:
        """Create a RayJob from the current template; return the answer's status and message, as of the API server."""
        status, message = self._read_template()
        return self.api.create(fill()) if status == 200 else (status, message)

    def capacity(self) -> Capacity | None:
        jobs = self.api.jobs()
        if jobs is None:
            return None
        self._sweep(jobs)
        if time.monotonic() - self._template_read >= TEMPLATE_SECONDS:
            self._read_template()
        memory, gpu_memory = map(self.template.worker_memory, (False, True))
        return replace(self.most, memory=memory, gpu_memory=gpu_memory)

    def stalled(self) -> str | None:
        return self.api.watch.stalled()

    def is_partly_placed(self, job: RayJob) -> bool:
        """Tell whether some pods of a RayJob have nodes and others have none."""
        cluster = (job.get("status") or {}).get("rayClusterStatus") or {}
        groups = (job["spec"].get("rayClusterSpec") or {}).get("workerGroupSpecs") or ()
        total = 1 + sum(group.get("replicas", 1) for group in groups)
        return is_partly_placed(self.api.pending_pods(job["metadata"]["name"]), cluster, total)

    def has_earlier(self, job: RayJob) -> bool:
        """Tell whether a RayJob that is older than this one is partly placed as well."""
        jobs = (self.api.jobs() or {}).values()
        earlier = (each for each in jobs if created(each) < created(job) and state_of(each) == "Initializing")
        return any(map(self.is_partly_placed, earlier))

    def _read_template(self) -> tuple[int, str]:
        """Read the template, if it is an object; return the answer's status and message, as of the API server."""
        self._template_read = time.monotonic()
        if not (name := self.template.options.template_object):
            return 200, ""
        status, answer = self.api.get(name)
        if status != 200:
            return status, answer
        try:
            self.template.use(answer)
        except GenmodelsError as error:
            return 422, str(error)
        return 200, ""

    def _sweep(self, jobs: dict[str, RayJob]) -> None:
        """Delete the RayJobs that ended KEEP_SECONDS ago; their results were read long before."""
        now = time.monotonic()
        ended = [name for name, job in jobs.items() if state_of(job) in ENDED_STATES]
        self._ended = {name: self._ended.get(name, now) for name in ended}
        for name, since in self._ended.items():
            if now - since >= KEEP_SECONDS and not is_going(jobs[name]):
                self.api.delete(name)


class _RayJob(Driver):
    """The RayJob of one attempt. Each poll repeats a request (create, delete) that was not answered.

    `code` and `reason` describe the end of the attempt; `poll` is None until the end is certain.
    """

    def __init__(
        self, backend: KubeRayBackend, run: Run, attempt: int, fill: Callable[[], RayJob] | None = None
    ) -> None:
        self.backend, self.api, self.run, self.attempt = backend, backend.api, run, attempt
        self.name = submission_id(run.job, run.model, attempt)
        self.fill = fill  # makes the RayJob to create; None once it exists
        self.deadline = time.monotonic() + ACCEPT_SECONDS
        self.queue = backend.template.options.queue
        self.code, self.ended = LOST, False
        self.deleting = self.existed = False
        self.gone_since: float | None = None
        self.partly_placed_since: float | None = None
        self.never_began = False  # known for certain while it is suspended
        self.head = ""
        self._create()

    def poll(self) -> int | None:
        if not self.ended and (jobs := self.api.jobs()) is not None:
            job = jobs.get(self.name)
            self.ended = self._check(job) if job else self._check_missing()
        return self.code if self.ended else None

    def kill(self) -> None:
        """Delete the RayJob; `poll` tells when the RayJob and its pods are gone."""
        self._end_by_deleting(-signal.SIGKILL, "")

    # Each of these methods returns True if the attempt has ended for good.

    def _check(self, job: RayJob) -> bool:
        self.fill, self.existed = None, True
        if is_going(job):
            if not self.deleting:
                self._end_by_deleting(LOST, "its RayJob was deleted", ask=False)
            return False
        if self.deleting:
            self.api.delete(self.name)
            return False
        state, status = state_of(job), job.get("status") or {}
        waited_for, self.waiting, self.problem = self.waiting, "", ""
        match state:
            case _ if state in ENDED_STATES:
                return self._has_ended(status, waited_for)
            case "Running":
                self.never_began = False
                self._watch_head(status)
            case "Retrying":
                self._end_by_deleting(LOST, "KubeRay was about to start it again")
            case "Suspending" | "Suspended" if self._had_begun():
                self.waiting = "is suspended: its pods end"
                if state == "Suspended":
                    why = "preempted: Kueue suspended it" if self.queue else "it was suspended"
                    self._end_by_deleting(PREEMPTED, why)
            case "" | "Initializing" | "Suspending" | "Suspended" if self.queue and job["spec"].get("suspend"):
                self.waiting = f"waits for Kueue to admit it to queue {self.queue}"
            case "Suspending" | "Suspended":
                self.waiting = "is suspended"
            case "":
                self.waiting, self.never_began = "waits for KubeRay to take its RayJob", False
            case "Initializing":
                self.never_began = False
                self._wait_for_pods(job, status)
            case _:
                self.problem = f"KubeRay reports a state that is not known here: {state}"
        return False

    def _wait_for_pods(self, job: RayJob, status: RayJob) -> None:
        obstacle = find_obstacle(self.api.pending_pods(self.name), status.get("rayClusterStatus") or {})
        self.waiting = obstacle.reason if obstacle else "waits for KubeRay to make its cluster"
        if obstacle and obstacle.final:
            self._end_by_deleting(REFUSED, obstacle.reason)
        elif self._gives_way(job):
            self._end_by_deleting(LOST, f"gave its nodes to an earlier run; {self.waiting}")

    def _gives_way(self, job: RayJob) -> bool:
        """Tell whether this run and an earlier one have held a part of their nodes for too long: each blocks the other.

        Without Kueue each pod gets a node by itself.
        """
        if self.queue or not self.backend.is_partly_placed(job):
            self.partly_placed_since = None
            return False
        now = time.monotonic()
        self.partly_placed_since = self.partly_placed_since or now
        return now - self.partly_placed_since >= self.backend.give_way_seconds and self.backend.has_earlier(job)

    def _has_ended(self, status: RayJob, waited_for: str) -> bool:
        code, reason = end_of(status)
        if status.get("reason") == "PreRunningDeadlineExceeded" and waited_for:
            reason += f"; before that: {waited_for}"
        if code:
            log.warning("RayJob %s: %s\n%s", self.name, reason, (status.get("message") or "")[-LOG:])
        if status.get("jobStatus") in DRIVER_ENDED or not status.get("rayClusterName"):
            self.code, self.reason = code, reason
            return True
        self._end_by_deleting(code, reason)  # its driver may still run
        return False

    def _watch_head(self, status: RayJob) -> None:
        """End the attempt if KubeRay made a new head pod: in HTTPMode it submits the driver to it again."""
        head = ((status.get("rayClusterStatus") or {}).get("head") or {}).get("podName") or ""
        if self.head and head and head != self.head:
            self._end_by_deleting(LOST, "its head pod was lost")
        self.head = head or self.head

    def _had_begun(self) -> bool:
        self.never_began = self.never_began or self.run.attempt_start(self.attempt) is None
        return not self.never_began

    def _check_missing(self) -> bool:
        """Handle a RayJob that the watch does not know: it may be newer than what the watch has brought."""
        if self.fill is not None:
            return self._create()
        if self.gone_since is None:
            status, job = self.api.get(self.name)
            if status == 200:
                return self._check(job)
            if status != 404:
                return False
        if not self.deleting:
            self._end_by_deleting(LOST, "its RayJob was deleted" if self.existed else "its RayJob is gone", ask=False)
        self.gone_since = self.gone_since or time.monotonic()
        pods = self.api.has_pods(self.name)
        if pods and time.monotonic() - self.gone_since > GONE_SECONDS:
            log.warning("RayJob %s is gone, but one of its pods remains: the wait for this pod ends", self.name)
            return True
        return pods is False

    def _create(self) -> bool:
        if self.fill is None:
            return False
        status, message = self.backend.create(self.fill)
        if status in (200, 201, 409):
            self.fill = None
        elif status in (400, 404, 413, 422):  # 404: the operator's CRD or the template is missing, maybe for a while
            self.ended, self.code = True, FAILED if status == 404 else REFUSED
            self.reason = f"Kubernetes refuses the RayJob: {short(message, REFUSAL)}"
        elif status == 403:  # rights, or a quota
            self.waiting = f"Kubernetes refuses the RayJob: {short(message, REFUSAL)}"
        elif time.monotonic() > self.deadline:
            self._end_by_deleting(LOST, "Kubernetes did not take the RayJob")  # the answer may be lost
        return self.ended

    def _end_by_deleting(self, code: int, reason: str, ask: bool = True) -> None:
        self.fill, self.deleting = None, True
        self.code, self.reason, self.waiting = code, reason, "its pods end"
        if ask:
            self.api.delete(self.name)
