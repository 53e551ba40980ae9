"""Test a run on a cluster of its own, as in a RayJob: a head without CPUs of Ray, and a node for the workers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genmodels.runs.jobs import Jobs
from genmodels.runs.log_lines import log_lines
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.storage import open_storage
from services.dispatch.backends import ray_jobs
from services.dispatch.backends.base import driver_command, pre_stop_command
from tests.support.driver_commands import end_of
from tests.support.paths import ROOT
from tests.support.ray_node import OTHER, JoinedNode, RayHead, RayNode, until
from tests.support.tiny_jobs import job, make_data, model

GRACE_SECONDS = 100


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RayHead, JoinedNode]]:
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")  # as in pods of training
    with RayHead(tmp_path / "head.log", num_cpus=0) as head, JoinedNode(tmp_path / "node.log", head, 2) as node:
        until(lambda: (there := head.backend.capacity()) and there.cpus == 2, "the node is there")
        yield head, node


def start(head: RayHead, folder: Path, name: str, workers: int, **train: Any) -> tuple[Run, Any]:
    storage = open_storage((folder / "storage").as_uri())
    entry = model(folder, "minigpt", **train) | {"scaling": {"num_workers": workers}}
    run = Run(storage, Jobs(storage).submit(job(name, entry))[0], "minigpt")
    return run, head.backend.start(storage.url, run.job, run.model, 1, workers)


@pytest.mark.long
def test_a_cluster_of_its_own(
    nodes: tuple[RayHead, JoinedNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publish on the worker's node; then end both nodes as the kubelet ends pods: the hook, then SIGTERM."""
    head = nodes[0]
    make_data(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ray_jobs, "driver_command", lambda *run: [*driver_command(*run), "--publish-on-worker"])
        run, driver = start(head, tmp_path, "published", 1, max_steps=3)
        assert end_of(driver, 120) == 0
    result = run.result(1)
    assert result is not None
    assert (result.outcome, result.version) == ("succeeded", 1), result.message

    assert any(line.line.endswith(f"publishes on node {OTHER}") for line in log_lines(run, "driver"))

    long = 10**6
    run, _ = start(head, tmp_path, "preempted", 2, max_steps=long, save_every=long, eval_every=long)
    until(lambda: (beat := run.heartbeat(1)) and beat.phase == "training" and beat.step > 2, "it trains")
    with ThreadPoolExecutor(2) as pods:
        assert list(pods.map(lambda each: end_pod(each, run), nodes)) == [0, 0]
    result = run.result(1)
    assert result is not None
    assert result.outcome == "stopped", result.message
    (saved,) = run.checkpoints()
    assert [row["step"] for row in metric_rows(run)] == [*range(1, saved.step + 1)], "each step that was made is saved"


def end_pod(node: RayNode, run: Run) -> int:
    command = pre_stop_command(run.storage.url, run.job, run.model, 1)
    hook = [sys.executable, *command[1:], "--seconds", str(GRACE_SECONDS)]
    code = subprocess.run(hook, cwd=ROOT, timeout=2 * GRACE_SECONDS).returncode
    node.process.terminate()
    node.process.wait(GRACE_SECONDS)
    assert node.process.stdin
    node.process.stdin.close()
    return code
