"""Keep the platform's RayJobs in memory: list them once, then follow their changes by Kubernetes's watch protocol.

One thread holds one open request, whatever number of runs there is. The API server sends each change as one line of
JSON, and bookmarks that tell how far the answer has come. It ends the request after WATCH_SECONDS; the next one goes on
from the last version. So at rest there are two requests a minute. All RayJobs are listed again only if that version is
too old for the API server (410).

The RayJobs are unknown (None) until the first list, and while no watch can be opened. A connection that is lost without
a word is noticed SILENCE_SECONDS after the last byte. A RayJob that is missing here may be newer than the last line:
`KubeApi.get` tells for certain.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable

from genmodels.threads import Rounds
from services.dispatch.backends.rayjob import RayJob

WATCH_SECONDS = 30  # after which the API server ends a watch
SILENCE_SECONDS = 35.0  # without a byte: the connection is dead
REOPEN_SECONDS = 1.0  # at least, from one watch to the next
MIN_BACKOFF, MAX_BACKOFF = 0.5, 10.0  # seconds after a failure; doubled each time
GONE = 410
OUTAGES = (0, 429, *range(500, 600))
METADATA = ("name", "creationTimestamp", "deletionTimestamp")

log = logging.getLogger("genmodels.kube")


class NoAnswer(Exception):
    """The API server did not answer, or refused. `status`: its HTTP status; 0 without an answer."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(f"status {status}")
        self.status = status


class JobWatch:
    """The RayJobs of the platform.

    Args:
        list_jobs: returns all RayJobs and the version of the list; raises NoAnswer.
        open_watch: returns the lines of a watch that begins after a version; raises NoAnswer.

    Attributes:
        version: Kubernetes's `resourceVersion` up to which all changes are here; "": a list is needed.
        failures: in a row, of requests for a list or a watch.
        stop: set to end the thread.
    """

    def __init__(
        self, list_jobs: Callable[[], tuple[list[RayJob], str]], open_watch: Callable[[str], Iterable[bytes]]
    ) -> None:
        self._list_jobs, self._open_watch = list_jobs, open_watch
        self._jobs: dict[str, RayJob] | None = None  # replaced at each change, so that readers need no lock
        self._known = False
        self._rounds: Rounds | None = None
        self.version, self.failures, self.stop = "", 0, threading.Event()

    def jobs(self) -> dict[str, RayJob] | None:
        """Return all RayJobs by name, or None if they are unknown. The first call starts the watch."""
        if self._rounds is None:
            self._rounds = Rounds("kube-watch", log, lasting=True)
            threading.Thread(target=self._run, args=(self._rounds,), name="kube-watch", daemon=True).start()
        return self._jobs if self._known else None

    def stalled(self) -> str | None:
        """Return why nothing is followed for long: the thread hangs, or a right is missing; None if all is well."""
        return self._rounds.stalled() if self._rounds else None

    def _run(self, rounds: Rounds) -> None:
        while not self.stop.is_set():
            began, completed = time.monotonic(), False
            try:
                with rounds.round(NoAnswer):
                    self._follow(rounds)
                    completed = True
            except NoAnswer as error:
                self.version = "" if error.status == GONE else self.version
                if error.status in OUTAGES:
                    rounds.progress()  # the thread is well, and a new process would not help
            self.failures = 0 if completed else self.failures + 1
            self._known = self._known and completed
            pause = began + REOPEN_SECONDS - time.monotonic() if completed else _backoff(self.failures)
            self.stop.wait(max(0.0, pause))

    def _follow(self, rounds: Rounds) -> None:
        """Follow one watch to its end. However it ends, the next watch continues from the last complete line."""
        if not self.version:
            jobs, version = self._list_jobs()
            self._jobs, self.version = {job["metadata"]["name"]: _summary(job) for job in jobs}, version
        lines = self._open_watch(self.version)
        self._known, self.failures = True, 0
        rounds.progress()
        for line in lines:
            if self.stop.is_set():
                return
            self._apply(line)
            rounds.progress()

    def _apply(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind, job = event["type"], event["object"]
            if kind == "ERROR":
                raise NoAnswer(job["code"])
            version, jobs = job["metadata"]["resourceVersion"], dict(self._jobs or {})
            if kind == "DELETED":
                jobs.pop(job["metadata"]["name"], None)
            elif kind != "BOOKMARK":
                jobs[job["metadata"]["name"]] = _summary(job)
        except (ValueError, KeyError, TypeError):  # a proxy's words, for instance
            raise NoAnswer(GONE) from None
        self._jobs, self.version = jobs, version


def _summary(job: RayJob) -> RayJob:
    """Return what the dispatcher reads of a RayJob, without its pod templates."""
    spec, metadata = job.get("spec") or {}, job["metadata"]
    groups = (spec.get("rayClusterSpec") or {}).get("workerGroupSpecs") or ()
    pods = [{"replicas": group.get("replicas", 1)} for group in groups]
    return {
        "metadata": {name: metadata[name] for name in METADATA if name in metadata},
        "spec": {"suspend": spec.get("suspend"), "rayClusterSpec": {"workerGroupSpecs": pods}},
        "status": job.get("status"),
    }


def _backoff(failures: int) -> float:
    """Return seconds, at random, so that not all dispatchers return to a recovered API server at once."""
    return min(MAX_BACKOFF, MIN_BACKOFF * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
