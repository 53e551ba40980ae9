"""Measure what grows with the past: the curve of a long run, and lists of jobs that have ended."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from genmodels.registry.gc import gc
from genmodels.runs.job_index import countdown
from genmodels.runs.jobs import EndedEntry, Jobs
from genmodels.runs.metric_rows import MetricWriter, training_seconds
from genmodels.runs.records import Change, Status
from genmodels.runs.store import Run
from genmodels.runs.thinning import ThinnedHistories
from genmodels.spec.parse import parse_spec
from genmodels.storage import write_document
from services.jobs.views import Views
from tests.bench.scale.rows import Row, in_parallel, opened, timed
from tests.support.counting_storage import CountingStorage
from tests.support.job_service import spec
from tests.support.s3_server import S3Server

DAY = 17_280  # parts of metrics: one each 5 s
CURVE_SECONDS = 1.0
POINTS = 500  # of a curve
PAGE_REQUESTS = 30  # of a page of 20 jobs
LONG_AGO = "2026-01-01T00:00:00.000+00:00"  # clean-up spares runs that ended just now
GC_REQUESTS = 30  # of a clean-up after another one


def measure_curve(server: S3Server, n: int) -> Iterator[Row]:
    """Open the curve of a run with so many parts, and learn how long it has trained."""
    storage, requests = opened(server, f"curve-{n}")
    recorded = CountingStorage()  # the recorder writes the day here, and its objects are copied
    begun = Run(recorded, "job", "m")
    begun.start_attempt(1, None, 1)
    writer = MetricWriter(begun, 1)
    for step in range(1, n + 1):
        writer.write([{"step": step, "loss": 1.0, "val_loss": 1.0, "seconds": step * 5.0}])
        writer.merge()
    for verb in ("put", "delete"):
        yield Row(f"metrics, {verb} requests for each part written", n, recorded.counts[f"{verb} runs"] / n, "")
    in_parallel(lambda key: storage.put(key, recorded.get(key)[0]), recorded.list("runs/"))
    run = Run(storage, "job", "m")

    def read() -> None:
        lines = ThinnedHistories().reader(run, POINTS)
        while lines() is None:
            pass

    with requests.counted() as counts:
        seconds = timed(read)
    yield Row("curve of N parts", n, seconds, "s", CURVE_SECONDS)
    yield Row("curve of N parts, requests", n, counts.total(), "")
    with requests.counted() as counts:
        assert training_seconds(run) == n * 5.0
    yield Row("seconds of training, requests", n, counts.total(), "", 10)


def measure_lists(server: S3Server, n: int) -> Iterator[Row]:
    """Read the first page of a list of N jobs that have ended."""
    storage, requests = opened(server, f"lists-{n}")

    def end(i: int) -> None:
        time = f"2026-11-{1 + i % 28:02d}T{i % 24:02d}:00:00.000+00:00"
        job = f"old-{i:08x}"
        entry = EndedEntry(
            job=job, name="old", priority=0, submitted=time, caller="", models=["m"], ended=time, states={"m": "failed"}
        )
        write_document(storage, f"ended/{countdown(time)}-{job}", entry.model_dump(mode="json"))

    in_parallel(end, range(n))
    views = Views(storage)
    with requests.counted() as counts:
        page = views.page("all", 20, "", lambda models: True)
    assert len(page.data) == min(n, 20)
    yield Row("first page of the list of N jobs, requests", n, counts.total(), "", PAGE_REQUESTS)


def measure_gc(server: S3Server, n: int) -> Iterator[Row]:
    """Clean up twice with N runs that have ended."""
    storage, requests = opened(server, f"gc-{n}")
    parsed = parse_spec(yaml.safe_dump(spec("old", "m")).encode(), "spec", paths=False)

    def end(_: int) -> None:
        job = Jobs(storage).submit(parsed)[0]
        history = [Change(state="cancelled", time=LONG_AGO, reason="by the bench")]
        Run(storage, job, "m").write_status(Status(state="cancelled", history=history), None)
        Jobs(storage).close(job, LONG_AGO, {"m": "cancelled"})

    in_parallel(end, range(n))
    with requests.counted() as counts:
        gc(storage).carry_out()
    yield Row("first clean-up with N ended runs, requests", n, counts.total(), "")
    with requests.counted() as counts:
        gc(storage).carry_out()
    yield Row("next clean-up with N ended runs, requests", n, counts.total(), "", GC_REQUESTS)
