"""Run the platform as processes to kill: an S3 server behind a proxy that fails on command, Ray, the job service.

All processes reach the store through the proxy; the tests read the store directly.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from genmodels.checkpoint import CheckpointRef
from genmodels.data import uploads
from genmodels.keys import Keys
from genmodels.registry.store import Registry
from genmodels.runs.jobs import Jobs
from genmodels.runs.log_lines import log_lines
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.queue import read_queue
from genmodels.runs.records import ENDED, Heartbeat, State, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import dump, model_digest
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import open_storage
from services.cluster.ports import free_ports
from services.dispatch.backends.base import submission_id
from services.dispatch.backends.ray_jobs import RayJobsBackend
from tests.support.fault_proxy import FaultProxy
from tests.support.plain_workers import WorkerGroup
from tests.support.ray_node import JoinedNode, RayHead, until
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import make_data, model

CPUS = 2
Look = Callable[[], Any]
# The states that may follow each state. A status between two reads may be overwritten by its successor.
LEGAL: dict[State, tuple[State, ...]] = {
    "queued": ("starting", "cancelled"),
    "starting": ("running", "publishing", "queued", "failed", "cancelled", "succeeded"),
    "running": ("publishing", "queued", "failed", "cancelled", "succeeded"),
    "publishing": ("queued", "failed", "cancelled", "succeeded"),
    "failed": ("queued",),
    "cancelled": ("queued",),
    "succeeded": (),
}


class JobService:
    """Run `python -m services.jobs` with a key, to be killed and started again; hold an HTTP client of it."""

    def __init__(self, log: Path, storage_url: str, ray_address: str, key: str, environment: dict[str, str]) -> None:
        port = free_ports(1)
        self.log = log
        self.command = [sys.executable, "-m", "services.jobs", "--storage", storage_url, "--port", str(port)]
        self.command += ["--ray-address", ray_address]
        self.environment = environment
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {key}"},
            timeout=30,
            trust_env=False,
        )

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **self.environment}, stdout=output, stderr=subprocess.STDOUT
            )
        if wait:
            until(self._answers, "the job service answers")

    def kill(self) -> None:
        """Kill the service with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Return the JSON of a successful response; retry while the store is away."""
        deadline = time.monotonic() + 60
        while True:
            answer = self.client.request(method, f"/v1{path}", **options)
            if answer.status_code != 503 or time.monotonic() > deadline:
                assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
                return answer.json()

    def text(self, path: str, **query: str) -> str:
        answer = self.client.get(f"/v1{path}", params=query)
        assert answer.is_success, answer.text
        return answer.text

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/healthz").status_code == 200
        return False


class Stack:
    """Run everything inside `with`; leave no process behind."""

    def __init__(self, folder: Path, **environment: str) -> None:
        """Args:
        environment: more variables for all processes, e.g. times that are scaled down.
        """
        self.folder = folder
        self.settings = {"GENMODELS_TEST": str(uuid.uuid4()), "OMP_NUM_THREADS": "1", **environment}
        self._references: dict[tuple[str, int], dict[str, str]] = {}
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        with contextlib.ExitStack() as exits:
            self._patch = exits.enter_context(pytest.MonkeyPatch.context())
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                self._patch.delenv(name)
            for name, value in {**self.settings, "XDG_CACHE_HOME": str(self.folder / "cache")}.items():
                self._patch.setenv(name, value)
            self.s3 = exits.enter_context(S3Server())
            self.proxy = exits.enter_context(FaultProxy(self.s3.url))
            for name, value in self.s3.environment.items():
                self._patch.setenv(name, value)
            self.storage = open_storage(f"s3://{self.s3.bucket}/{uuid.uuid4().hex}")
            self.jobs, self.registry = Jobs(self.storage), Registry(self.storage)
            make_data(self.folder)
            uploads.add(self.storage, "shapes", self.folder / "pictures", image_size=16)
            _, token = Keys(self.storage).create("tests", ("submit", "admin"))
            exits.callback(self._sweep)
            with self.through_proxy():
                self.head = RayHead(self.folder / "ray.log", CPUS)
                self.service = JobService(
                    self.folder / "jobs.log",
                    self.storage.url,
                    self.head.dashboard,
                    token,
                    {"AWS_ENDPOINT_URL": self.proxy.url},
                )
                self.service.start(wait=False)
                exits.enter_context(self.head)
            until(self.service._answers, "the job service answers")
            exits.callback(self.service.kill)
            exits.callback(self.service.client.close)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @contextlib.contextmanager
    def through_proxy(self) -> Iterator[None]:
        """Make Ray's processes that are started inside this context reach the store through the proxy."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.proxy.url)
            yield

    # Jobs

    def submit(self, name: str, *models: dict[str, Any], priority: int = 0) -> str:
        """Submit a job; return its id."""
        spec = yaml.safe_dump({"name": name, "priority": priority, "models": list(models)})
        headers = {"content-type": "application/yaml", "idempotency-key": uuid.uuid4().hex}
        return str(self.service.ask("POST", "/jobs", content=spec, headers=headers)["job"])

    def cancel_all(self) -> None:
        """Cancel all open jobs, at once."""
        for job in self.jobs.open():
            self.service.ask("POST", f"/jobs/{job}/cancel", json={"now": True})
        until(lambda: not self.jobs.open(), "all jobs have ended")

    def submit_one(self, model: dict[str, Any], priority: int = 0) -> Run:
        """Submit a job with one model; return its run."""
        return self.run(self.submit(model["name"], model, priority=priority), model["name"])

    def run(self, job: str, name: str) -> Run:
        return Run(self.storage, job, name)

    def trains(self, run: Run, attempt: int = 1, *, since: float | None = None, what: str = "") -> None:
        """Wait until an attempt makes steps.

        Args:
            since: when the event happened, by the monotonic clock.
            what: the event, for the figures that pytest -s shows.
        """
        self._await(run, lambda: _makes_steps(run.heartbeat(attempt)), f"attempt {attempt} trains")
        if since is not None:
            tell_figure(time.monotonic() - since, f"{what}, until training again")

    def trains_with(self, run: Run, workers: int, *, since: float, what: str) -> int:
        """Wait until the newest attempt makes steps with this number of workers; return the attempt's number."""

        def is_it() -> bool:
            newest = run.started()[-1]
            return run.attempt_start(newest).world_size == workers

        self._await(run, is_it, f"an attempt has {workers} workers")
        attempt = run.started()[-1]
        self.trains(run, attempt, since=since, what=what)
        return attempt

    def saves(self, run: Run, attempt: int = 1) -> CheckpointRef:
        """Wait for a checkpoint of an attempt; return the newest one."""
        self._await(run, lambda: self.newest_manifest(run, attempt), f"attempt {attempt} saves")
        newest = self.newest_manifest(run, attempt)
        assert newest
        return newest

    def newest_manifest(self, run: Run, attempt: int) -> CheckpointRef | None:
        """Return the newest manifest that an attempt has stored, whether or not it counts."""
        keys = self.storage.list(f"{run.prefix}/attempt-{attempt}/checkpoints/")
        steps = [int(match[1]) for key in keys if (match := re.search(r"/step-(\d+)/manifest.json$", key))]
        return CheckpointRef(attempt=attempt, step=max(steps)) if steps else None

    def reaches(self, run: Run, state: State, timeout: float = 300) -> Status:
        """Wait for a state; return the status."""
        self._await(run, lambda: run.status()[0].state == state, state, timeout, then=state)
        return run.status()[0]

    def shown_job(self, job: str) -> dict[str, Any]:
        """Return a job as the API shows it."""
        return dict(self.service.ask("GET", f"/jobs/{job}"))

    def shown(self, run: Run) -> dict[str, Any]:
        """Return a run as the API shows it."""
        return next(shown for shown in self.shown_job(run.job)["models"] if shown["model"] == run.model)

    def received_write(self, path: str) -> bool:
        """Return True if the store received a write there."""
        return any(method == "PUT" and path in request_path for method, request_path, _ in self.proxy.requests)

    def capacity(self) -> int:
        """Return the CPUs that the dispatcher knows of; it caches Ray's answer for a moment."""
        capacity = read_queue(self.storage).capacity
        return capacity["cpus"] if capacity else 0

    def tell(self, run: Run) -> str:
        """Describe a run that did not do what it should."""
        lines = [f"{line.attempt}/{line.source} {line.line}" for line in log_lines(run)]
        return "\n".join(
            [
                *lines[-40:],
                f"--- the job service, exit code {self.service.process.poll()}",
                self.service.log.read_text()[-3000:],
            ]
        )

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        tell_figure(time.monotonic() - began, what)

    # Processes

    def find(self, title: str) -> list[int]:
        """Return living processes of this stack whose command line contains `title`, the oldest first."""
        mark, pids = f"GENMODELS_TEST={self.settings['GENMODELS_TEST']}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = mark in (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            if mine and command and title.encode() in command and int(folder.name) != os.getpid():
                pids.append(int(folder.name))
        return sorted(pids)

    def drivers(self, run: Run, attempt: int) -> list[int]:
        """Return the driver's process, and the shell that started it."""
        return self.find(f"--job {run.job} --model {run.model} --attempt {attempt} ")

    def workers(self, run: Run, attempt: int) -> list[int]:
        """Return the processes of the worker group of an attempt."""
        ask = RayJobsBackend(self.head.dashboard).dashboard.ask
        answer = ask("GET", f"/api/jobs/{submission_id(run.job, run.model, attempt)}")
        assert answer is not None
        assert answer.status_code == 200
        ray_job = answer.json()["job_id"]
        answer = ask("GET", "/api/v0/actors?detail=1&limit=10000")
        assert answer is not None
        actors = answer.json()["data"]["result"]["result"]
        return sorted(
            actor["pid"]
            for actor in actors
            if actor["job_id"] == ray_job and actor["state"] == "ALIVE" and "TrainWorker" in actor["class_name"]
        )

    def kill(self, *pids: int) -> float:
        """Kill processes with SIGKILL, and wait until they are gone; return the time of the kill."""
        when = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(_lives, pids)), f"{pids} end", 20)
        return when

    def kill_ray(self) -> None:
        """Kill all processes of Ray with SIGKILL: GCS, raylet, agents, drivers, workers."""
        self.head.kill()
        self._sweep(self.service.process.pid)

    def start_ray(self) -> None:
        with self.through_proxy():
            self.head.start()
        backend = RayJobsBackend(self.head.dashboard)
        until(lambda: backend.capacity(), "Ray starts again", 90)

    def join(self, cpus: int) -> JoinedNode:
        """Add a node to the cluster."""
        with self.through_proxy():
            return JoinedNode(self.folder / "node.log", self.head, cpus)

    # Truth

    def check_succeeded(self, run: Run, attempts: int | None = None, exact: bool = True) -> Status:
        """Check what must be true of a run at its end, whatever happened to it.

        Args:
            attempts: the number of attempts that the run must have had.
            exact: whether the weights are those of an undisturbed run, for an unchanged number of workers.
        """
        (status, _), spec = run.status(), self._spec(run)
        assert status.state == "succeeded", f"{status.history}\n{self.tell(run)}"
        check_history(status)
        if attempts is not None:
            assert status.attempt == attempts, [f"{change.state}: {change.reason}" for change in status.history]
        steps = [row["step"] for row in metric_rows(run)]
        assert steps == list(range(1, spec.train.max_steps + 1)), f"{len(steps)} rows, first {steps[:3]}"
        last = run.checkpoints()[-1]
        assert last.step == spec.train.max_steps
        versions = [self.registry.version(run.model, number) for number in self.registry.versions(run.model)]
        assert [version.job for version in versions] == [run.job]
        manifest = run.manifest(last)
        if exact:
            digests = {name: file.sha256 for name, file in manifest.files.items()}
            assert digests == self.undisturbed(spec, manifest.lineage.world_size)
        shown = self.shown(run)
        assert (shown["state"], shown["version"], shown["attempt"]) == ("succeeded", 1, status.attempt)
        return status

    def undisturbed(self, spec: ModelSpec, workers: int) -> dict[str, str]:
        """Return the sha256 of the last checkpoint's files, of the same training in plain processes without faults."""
        spec = spec.model_copy(update={"name": "calm"})
        digest = model_digest(spec), workers
        if digest not in self._references:
            calm = open_storage((self.folder / f"calm-{len(self._references)}").as_uri())
            uploads.add(calm, "shapes", self.folder / "pictures", image_size=16)
            calm.put("jobs/calm/spec.json", dump(JobSpec(name="calm", models=[spec])))
            with WorkerGroup(workers, calm.url, [("calm", "calm", 1)]) as group:
                group.succeed()
            manifest = Run(calm, "calm", "calm").manifest(CheckpointRef(attempt=1, step=spec.train.max_steps))
            self._references[digest] = {name: file.sha256 for name, file in manifest.files.items()}
        return self._references[digest]

    def _spec(self, run: Run) -> ModelSpec:
        return next(spec for spec in self.jobs.spec(run.job).models if spec.name == run.model)

    def _await(self, run: Run, look: Look, what: str, timeout: float = 300, then: State | None = None) -> None:
        """Wait for an event of a run; fail if the run ends before it."""
        deadline = time.monotonic() + timeout
        while not look():
            status = run.status()[0]
            late, ended = time.monotonic() > deadline, status.state in ENDED and status.state != then
            if (late or ended) and not look():
                history = "\n".join(f"{change.time} {change.state}: {change.reason}" for change in status.history)
                raise AssertionError(f"{run.name}, not within {timeout:g} s: {what}\n{history}\n{self.tell(run)}")
            time.sleep(0.1)

    def _sweep(self, *spared: int) -> None:
        """Kill the remaining processes of this stack, except the S3 server."""
        while pids := [pid for pid in self.find("") if pid not in spared and not _is_of_s3(pid)]:
            self.kill(*pids)


def tiny_model(name: str, workers: int | dict[str, int] = 1, **train: Any) -> dict[str, Any]:
    """Return a model as the API takes it, which logs each step."""
    settings = {"max_steps": 600, "save_every": 50, "eval_every": 10_000, "log_every": 1, **train}
    entry = model(Path(), "vae", name, **settings)
    return {**entry, "data": {"dataset": "shapes"}, "scaling": {"num_workers": workers}}


def tell_figure(seconds: float, what: str) -> None:
    print(f"{seconds:6.1f} s  {what}", flush=True)


def check_history(status: Status) -> None:
    """Check that every change of state is allowed, has a reason, and comes after the change before."""
    history = status.history
    assert history[0].state == "queued"
    for before, after in itertools.pairwise(history):
        assert after.state in LEGAL[before.state], f"{before.state} -> {after.state}: {history}"
        assert before.time <= after.time
    assert all(change.reason for change in history)
    assert [change.state for change in history].count("starting") == status.attempt
    assert [change.state for change in history].count("succeeded") == (status.state == "succeeded")


def parents(run: Run) -> list[CheckpointRef | None]:
    """Return the checkpoints that the attempts of a run continued from."""
    return [link.parent for link in run.chain()]


def _makes_steps(heartbeat: Heartbeat | None) -> bool:
    return heartbeat is not None and heartbeat.phase not in ("starting", "compiling")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _is_of_s3(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"weed" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
