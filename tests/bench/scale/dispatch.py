"""Measure the dispatcher with N running runs: a take-over, and the rounds after it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import yaml

from genmodels.runs.jobs import Jobs
from genmodels.runs.records import Heartbeat, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from genmodels.storage import Storage
from services.dispatch.backends.base import Backend, Capacity, Driver
from services.dispatch.dispatcher import POLL_SECONDS, Dispatcher
from tests.bench.scale.rows import Row, in_parallel, opened, timed
from tests.support.job_service import spec
from tests.support.s3_server import S3Server

MODELS = 10  # of a job
TICKS = 12
TAKE_OVER_SECONDS, TICK_SECONDS = 10.0, 2.0


class Busy(Backend):
    """A cluster whose drivers all run."""

    def find(self, *_: Any) -> Driver:
        return RunningDriver()

    start = find

    def capacity(self) -> Capacity:
        return Capacity(10**6, 0)


class RunningDriver(Driver):
    def poll(self) -> int | None:
        return None

    def kill(self) -> None:
        raise AssertionError


def measure(server: S3Server, n: int) -> Iterator[Row]:
    storage, requests = opened(server, f"dispatch-{n}")
    with requests.counted() as counts:
        runs = submit(storage, n)
    yield Row("submission, requests for each run", n, counts.total() / n, "")
    in_parallel(begin_training, runs)
    dispatcher = Dispatcher(storage, Busy())
    cpu = time.process_time()
    with requests.counted() as counts:
        seconds = timed(lambda: dispatcher.dispatch_once(1))
    yield Row("take-over of N running runs", n, seconds, "s", TAKE_OVER_SECONDS)
    yield Row("take-over, CPU time of the dispatcher", n, time.process_time() - cpu, "s")
    yield Row("take-over, requests for each run", n, counts.total() / n, "")
    ticks = []
    with requests.counted() as counts:
        began = time.perf_counter()
        for _ in range(TICKS):
            ticks.append(timed(lambda: dispatcher.dispatch_once(1)))
            time.sleep(POLL_SECONDS)
        lasted = time.perf_counter() - began
    yield Row("longest of 12 rounds with N running runs", n, max(ticks), "s", TICK_SECONDS)
    yield Row("rounds, requests a second", n, counts.total() / lasted, "/s")


def submit(storage: Storage, n: int) -> list[Run]:
    models = [f"m{i}" for i in range(MODELS)]
    parsed = parse_spec(yaml.safe_dump(spec("many", *models)).encode(), "spec", paths=False)
    jobs = (Jobs(storage).submit(parsed)[0] for _ in range(n // MODELS))
    return [Run(storage, job, model) for job in jobs for model in models]


def begin_training(run: Run) -> None:
    """Have a run train its first attempt."""
    run.start_attempt(1, None, 1)
    starting = Status(state="queued").to("queued", "submitted").to("starting", "attempt 1", attempt=1, workers=1)
    run.write_status(starting.to("running", "the workers train"), None)
    run.write_heartbeat(1, Heartbeat(phase="training", step=5, max_steps=10**6, progress_count=5))
