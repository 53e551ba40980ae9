"""One worker and two, as plain processes and under Ray Train: the seconds of a step, and the stall of a save."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.local.platform import submit
from tests.bench.rounds import ratio
from tests.bench.training.loops import Size, job_spec
from tests.support.plain_workers import WorkerGroup

SECONDS = 900  # until a run counts as hung
SIZE, RECIPE = Size(96, 3, 6, 128, 24), "modern, AdamW"
SAVES = 5  # of a run
Train = Callable[[Storage, str, int], None]


def plain(storage: Storage, job: str, workers: int) -> None:
    """Train in plain processes, with no more of the platform than the loop and its recorder."""
    with WorkerGroup(workers, storage.url, [(job, "bench", 1)]) as group:
        group.succeed(SECONDS)


def under_ray(storage: Storage, job: str, workers: int) -> None:
    """Train in a worker group of Ray Train, by the driver that the platform starts."""
    command = [sys.executable, "-m", "services.train", "--storage", storage.url, "--job", job, "--model", "bench"]
    command += ["--attempt", "1", "--workers", str(workers)]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


def rows(storage: Storage, data: dict[str, Any], name: str, train: Train, workers: int, steps: int) -> list[Any]:
    """Train a model with that many workers; return the metric rows of its steps."""
    settings = {"max_steps": steps, "save_every": steps // SAVES, "log_every": 1}
    spec = job_spec(SIZE, RECIPE, data, name=name, scaling={"num_workers": workers}, **settings)
    job = submit(storage, spec)
    train(storage, job, workers)
    return list(metric_rows(Run(storage, job, "bench")))


def measure(storage: Storage, data: dict[str, Any], rounds: int, steps: int, *, with_ray: bool) -> Iterator[str]:
    """Yield the cost of Ray Train, the gain of a second worker, and the stall of a save, as ratios and milliseconds."""
    ways: dict[str, Train] = {"plain processes": plain} | ({"Ray Train": under_ray} if with_ray else {})
    medians: dict[tuple[str, int], list[float]] = {(way, n): [] for way in ways for n in (1, 2)}
    stalls: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds):
        for way, n in medians:
            name = f"bench-{round_}-{n}-{way.replace(' ', '-').lower()}"
            all_rows = rows(storage, data, name, ways[way], n, steps)
            usual = statistics.median(row["step_seconds"] for row in all_rows[SAVES:])
            medians[way, n].append(usual)
            if n == 1:
                stalls[way] += [row["step_seconds"] - usual for row in all_rows if row["step"] in _after_a_save(steps)]
    for way in ways:
        one, two = medians[way, 1], medians[way, 2]
        yield f"{way}, 1 worker: {1000 * statistics.median(one):.1f} ms a step"
        yield f"{way}, 2 workers against 1: {ratio(one, two)} x the samples a second"
        yield f"{way}, the step after a save: {1000 * statistics.median(stalls[way]):+.1f} ms"
    if with_ray:
        yield f"Ray Train's share of the speed of plain processes: {ratio(*(medians[way, 1] for way in ways))}"


def _after_a_save(steps: int) -> range:
    """Return the steps whose duration includes a snapshot and the begin of an upload."""
    return range(steps // SAVES + 1, steps, steps // SAVES)
