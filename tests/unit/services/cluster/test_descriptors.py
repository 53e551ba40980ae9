"""Test that each command that would start Ray reports a too low limit of open files, and ends."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from services.cluster.descriptors import MAX_FILES, file_limit, raise_file_limit
from services.http.connections import MAX_CONNECTIONS
from tests.support.paths import ROOT

GENMODELS = str(Path(sys.executable).parent / "genmodels")
SERVICE = [sys.executable, "-m"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [GENMODELS, "run", str(ROOT / "jobs" / "quickstart.yaml"), "--no-auth"],
        [GENMODELS, "up", "--no-auth"],
        [*SERVICE, "services.jobs", "--storage", "{storage}", "--no-auth"],
        [*SERVICE, "services.node", "worker", "--head", "head", "--storage", "{storage}"],
    ],
    ids=["run", "up", "jobs", "node"],
)
def test_too_few_open_files_are_one_line(tmp_path: Path, command: list[str]) -> None:
    files = 64
    storage = (tmp_path / "storage").as_uri()
    done = subprocess.run(
        [part.format(storage=storage) for part in command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: open files: this process may have {files}, ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("storage/jobs/*"))


def test_the_limit_is_raised_as_far_as_it_may_be() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        raise_file_limit()
        assert file_limit() == (MAX_FILES if before[1] == resource.RLIM_INFINITY else min(before[1], MAX_FILES))
        assert file_limit() >= MAX_CONNECTIONS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
