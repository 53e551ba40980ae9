"""A resumed run of each family has the same bits as an uninterrupted run, at world sizes 2 and 3."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genmodels import checkpoint, models
from genmodels.checkpoint import CheckpointRef
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.local.platform import submit
from tests.support.plain_workers import WorkerGroup
from tests.support.tiny_jobs import job, make_data, model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_resumed_run_ends_with_the_same_bits(data: Path, tmp_path: Path, world_size: int) -> None:
    storage = open_storage(f"file://{tmp_path}")
    entries = [model(data, family) for family in models.names()]
    entries.append(model(data, "minigpt", "minigpt-muon", optimizer="muon", clip_norm=1.0, accumulation_steps=2))
    names = [entry["name"] for entry in entries]
    job_name = submit(storage, job("exact", *entries))
    with WorkerGroup(world_size, storage.url, [(job_name, name, 1) for name in names]) as group:
        group.succeed()
    undisturbed = {name: final_files(Run(storage, job_name, name), CheckpointRef(attempt=1, step=6)) for name in names}
    for name in names:  # as if the machine had died after the manifest of step 3
        run = Run(storage, job_name, name)
        storage.delete(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=6))}/{checkpoint.MANIFEST}")
    with WorkerGroup(world_size, storage.url, [(job_name, name, 2) for name in names]) as group:
        group.succeed()
    for name in names:
        run = Run(storage, job_name, name)
        assert [(link.attempt, link.until) for link in run.chain()] == [(1, 3), (2, None)]
        assert final_files(run, CheckpointRef(attempt=2, step=6)) == undisturbed[name], name
        assert [row["step"] for row in metric_rows(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_killed_workers_change_no_bit(data: Path, tmp_path: Path) -> None:
    kill_and_resume(data, tmp_path, "minigpt", 2, max_steps=200)


@pytest.mark.long
@pytest.mark.parametrize("family", models.names())
@pytest.mark.parametrize("checkpoints", [1, 5])
def test_killed_workers_of_every_family_change_no_bit(
    data: Path, tmp_path: Path, family: str, checkpoints: int
) -> None:
    kill_and_resume(data, tmp_path, family, checkpoints, max_steps=400)


def kill_and_resume(data: Path, folder: Path, family: str, checkpoints: int, max_steps: int) -> None:
    """Kill one worker after some checkpoints: the group ends, the next group continues from the last manifest."""
    storage = open_storage(f"file://{folder}")
    train = {"max_steps": max_steps, "save_every": 20, "eval_every": max_steps, "batch_size": 12}
    calm, killed = (submit(storage, job(name, model(data, family, **train))) for name in ("calm", "killed"))
    with WorkerGroup(2, storage.url, [(calm, family, 1)]) as group:
        group.succeed()

    run = Run(storage, killed, family)
    with WorkerGroup(2, storage.url, [(killed, family, 1)]) as group:
        until(lambda: run.checkpoints() and run.checkpoints()[-1].step >= 20 * checkpoints)
        os.kill(group.processes[1].pid, signal.SIGKILL)
        codes = group.wait()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    saved = run.checkpoints()[-1].step
    assert saved < max_steps, "the run was over before it could be killed"

    with WorkerGroup(2, storage.url, [(killed, family, 2)]) as group:
        group.succeed()
    assert run.chain()[-1].parent == CheckpointRef(attempt=1, step=saved)
    last = CheckpointRef(attempt=2, step=max_steps)
    undisturbed = CheckpointRef(attempt=1, step=max_steps)
    assert final_files(run, last) == final_files(Run(storage, calm, family), undisturbed)


@pytest.mark.slow
def test_leaving_saves_at_the_step_where_it_leaves(data: Path, tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}")
    name = submit(storage, job("stop", model(data, "autoencoder", max_steps=5000, save_every=5000, eval_every=5000)))
    run = Run(storage, name, "autoencoder")
    with WorkerGroup(2, storage.url, [(name, "autoencoder", 1)]) as group:
        until(lambda: (heartbeat := run.heartbeat(1)) is not None and heartbeat.step > 0)
        run.send_command("stop", 1, "a test")
        group.succeed()
    (ref,) = run.checkpoints()
    assert 0 < ref.step < 5000
    assert list(metric_rows(run))[-1]["step"] == ref.step


def final_files(run: Run, ref: CheckpointRef) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint: weights, averaged weights, optimizers, assets."""
    return {name: file.sha256 for name, file in run.manifest(ref).files.items()}


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
