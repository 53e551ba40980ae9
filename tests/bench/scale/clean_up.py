"""Measure what `gc` costs with N ended runs: the first one removes two checkpoints of each, the next one nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

from genmodels.registry.gc import gc
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import Change, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from tests.bench.scale.rows import Row, in_parallel, opened, timed
from tests.support.s3_server import S3Server
from tests.support.storages import MemoryStorage, save

LONG_AGO = "2020-01-01T00:00:00.000+00:00"
SECOND_REQUESTS = 3  # the marks, whether they are complete, and the open jobs


def measure(server: S3Server, n: int) -> Iterator[Row]:
    storage, requests = opened(server, f"gc-{n}")
    job, objects = _ended_run()

    def store(number: int) -> None:
        for key, data in objects.items():
            for old, new in ((job, f"old-{number:08x}"), ("the-model", f"model-{number}")):
                key, data = key.replace(old, new), data.replace(old.encode(), new.encode())
            storage.put(key, data)

    in_parallel(store, range(n))
    with requests.counted() as counts:
        plan = gc(storage)
        plan.carry_out()
    assert len(plan.items) == 2 * n
    yield Row("first gc of N ended runs, requests for each", n, counts.total() / n, "")
    with requests.counted() as counts:
        seconds = timed(lambda: gc(storage).carry_out())
    yield Row("second gc of N ended runs, requests", n, counts.total(), "", SECOND_REQUESTS)
    yield Row("second gc of N ended runs", n, seconds, "s")


def _ended_run() -> tuple[str, dict[str, bytes]]:
    """Return the job and the objects of a run that has ended long ago."""
    storage = MemoryStorage()
    entry = {"name": "the-model", "model": {"family": "vae"}, "data": {"dataset": "digits"}}
    job, _ = Jobs(storage).submit(parse_spec(json.dumps({"name": "shapes", "models": [entry]}).encode(), "spec"))
    run = Run(storage, job, "the-model")
    run.start_attempt(1, None, 1)
    for step in (1, 2, 3):
        save(run, 1, step)
    change = Change(state="succeeded", time=LONG_AGO, reason="")
    run.write_status(Status(state="succeeded", attempt=1, history=[change]), None)
    Jobs(storage).close(job, LONG_AGO, {"the-model": "succeeded"})
    return job, storage.objects
