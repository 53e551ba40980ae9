"""Test long histories: which rows remain, and how many are in memory at a time."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.runs.metric_rows import metric_lines, metric_rows
from genmodels.runs.store import Run
from genmodels.runs.thinning import thinned_rows
from genmodels.storage import Storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.jobs.lines import LINES_AT_ONCE
from tests.support.asgi_client import ask
from tests.support.job_service import Service
from tests.support.published_models import publish
from tests.support.run_parts import write_metrics

PARTS = 30


def lines(count: int, evaluations: set[int]) -> Iterator[bytes]:
    for step in range(count):
        row = {"step": step, "loss": 1.0 / (step + 1), **({"val_loss": 1.0} if step in evaluations else {})}
        yield json.dumps(row).encode()


@pytest.mark.parametrize("most", [10, 11, 50, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 21, 49, 100, 999, 20_001])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_rows_are_spread_evenly(most: int, count: int, share: float) -> None:
    evaluations = set(random.Random(count).sample(range(count), int(share * count)))
    rows = [json.loads(line) for line in thinned_rows(lines(count, evaluations), most)]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert len(rows) <= most
    assert len(rows) == count or len(rows) >= most // 2
    kept = [step for step in steps if step in evaluations]
    assert len(kept) == len(evaluations) or len(kept) >= most // 2
    if count:
        assert {0, count - 1} <= set(steps)
    if share in (0.0, 1.0):
        assert max((b - a for a, b in pairwise(steps)), default=0) <= 4 * count / most + 1


@pytest.mark.slow
def test_a_long_series_is_not_held() -> None:
    tracemalloc.start()
    try:
        assert len(thinned_rows(lines(100_000, set(range(0, 100_000, 10))), 1000)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20  # of 5 MB of rows
    finally:
        tracemalloc.stop()


@pytest.fixture
def long(file_storage: Storage) -> tuple[Service, str, Run]:
    """Return a run of two attempts: steps 1 to 30,000; the second attempt wrote the last 10,000."""
    service = Service(file_storage)
    job = service.submit("long")
    run = Run(file_storage, job, "long")
    run.start_attempt(1, None, 1)
    size = 1000
    for first in range(1, PARTS * size, size):
        attempt = 1 if first <= 20 * size else 2
        if first == 20 * size + 1:
            write_metrics(run, 1, [{"step": step, "loss": 9.0} for step in range(first, first + 10)])  # superseded
            run.start_attempt(2, CheckpointRef(attempt=1, step=20 * size), 1)
        write_metrics(run, attempt, [{"step": step, "loss": float(attempt)} for step in range(first, first + size)])
    return service, job, run


@pytest.mark.parametrize("after", [0, 1, 999, 1000, 1001, 19_999, 20_000, 20_001, 29_999, 30_000, 10**9])
def test_all_rows_come_in_order_from_any_step(long: tuple[Service, str, Run], after: int) -> None:
    service, job, run = long
    rows = service("GET", f"/v1/jobs/{job}/metrics?after={after}").json()["data"]
    assert rows == [row for row in metric_rows(run) if row["step"] > after]
    assert [row["step"] for row in rows] == list(range(after + 1, 30_001))
    assert {row["loss"] for row in rows} <= {1.0, 2.0}


@pytest.mark.parametrize("points", [10, 100, 1000])
def test_readers_choose_how_many_rows(long: tuple[Service, str, Run], points: int) -> None:
    service, job, _ = long
    rows = service("GET", f"/v1/jobs/{job}/metrics?points={points}").json()["data"]
    assert (len(rows), rows[0]["step"], rows[-1]["step"]) == (points, 1, 30_000)


@pytest.mark.parametrize("points", [0, 9, 10_001, -1, "x"])
def test_the_number_of_rows_is_bounded(long: tuple[Service, str, Run], points: int) -> None:
    service, job, _ = long
    assert service("GET", f"/v1/jobs/{job}/metrics?points={points}").status_code == 400


def test_metrics_are_read_as_they_are_sent(long: tuple[Service, str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is read only when a row of it is needed; parts before the first requested step are never read."""
    _, _, run = long
    read = []
    get = run.storage.get_range
    monkeypatch.setattr(run.storage, "get_range", lambda key, *range: read.append(key) or get(key, *range))
    rows = metric_lines(run)
    for _ in range(LINES_AT_ONCE):
        next(rows)
    assert len(read) == 1
    read.clear()
    assert len(list(metric_lines(run, 29_500))) == 500
    assert len(read) == 1


def test_the_gateway_returns_the_requested_number_of_rows(file_storage: Storage) -> None:
    version = publish(file_storage, "long", "vae")
    run = Run(file_storage, version.job, "long")
    run.start_attempt(1, None, 1)
    write_metrics(run, 1, [{"step": step, "loss": float("nan")} for step in range(1, 5001)])
    app = create_app(ModelHost(file_storage.url))
    for query, count in (("", 1000), ("?points=10", 10), ("?points=250", 250)):
        rows = ask(app, "GET", f"/v1/models/long/history{query}").json()["data"]
        assert (len(rows), rows[0], rows[-1]["step"]) == (count, {"step": 1, "loss": "nan"}, 5000)
    for points in (9, 1001):
        assert ask(app, "GET", f"/v1/models/long/history?points={points}").status_code == 400
