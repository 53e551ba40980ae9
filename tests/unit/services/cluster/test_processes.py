"""Test that managed processes are restarted, and that no process remains, whichever process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from services.cluster import processes
from services.cluster.processes import ManagedProcess
from tests.support.live_processes import is_alive
from tests.support.ray_node import until

# A command with two children: one in its process group, one in a group of its own, as Ray's agents are.
FAMILY = "sleep 1000 & echo $$ $! > pids; set -m; sleep 1000 & echo $! >> pids; wait"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "READY_EVERY", 0.0)
    monkeypatch.setattr(processes, "BACK_OFF_SECONDS", (0.0, 0.0, 1000.0))
    return tmp_path


def make(place: Path, script: str, ready: bool = True) -> ManagedProcess:
    return ManagedProcess(
        "part", ["bash", "-c", script], place / "logs" / "part.log", lambda: ready, "http://it", os.environ
    )


def pids(place: Path) -> list[int]:
    pids = until(lambda: (words := _read(place / "pids").split()) and len(words) == 3 and words, "all have begun")
    (place / "pids").unlink()
    return [int(word) for word in pids]


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_process_that_dies_is_restarted_and_leaves_nothing(place: Path) -> None:
    lines: list[str] = []
    process = make(place, FAMILY)
    process.poll(lines.append)
    first = pids(place)
    until(lambda: process.poll(lines.append) or process.is_ready, "it is ready")
    os.kill(first[0], signal.SIGKILL)
    until(lambda: process.poll(lines.append) or len(lines) == 2, "the log reports its end")
    assert not any(map(is_alive, first))
    until(lambda: process.poll(lines.append) or len(lines) == 3, "it is ready again")
    second = pids(place)
    assert set(first) & set(second) == set()
    assert lines[0] == lines[2] == "part         http://it   ready after 0 s"
    assert lines[1].startswith("part         was ended by SIGKILL; restarts in 0 s. Log: ")

    assert process.process
    os.kill(process.process.pid, signal.SIGKILL)  # the reaper itself
    until(lambda: process.poll(lines.append) or len(lines) == 4, "the log reports its end")
    assert not any(map(is_alive, second))

    until(lambda: process.poll(lines.append) or process.is_running, "it is started again")
    third = pids(place)
    process.stop(0)
    assert not any(map(is_alive, third))
    assert not process.is_running


def test_the_pause_before_a_restart_grows(place: Path) -> None:
    lines: list[str] = []
    process = make(place, "echo out; echo error >&2; exit 3", ready=False)
    until(lambda: process.poll(lines.append) or len(lines) == 3, "three ends")
    assert [line.partition("restarts ")[2].partition(".")[0] for line in lines] == ["in 0 s", "in 0 s", "in 1000 s"]
    assert all("ended with code 3" in line for line in lines)
    process.poll(lines.append)
    assert not process.is_running
    assert process.log.read_text() == "out\nerror\n" * 3


def test_sigterm_comes_before_sigkill(place: Path) -> None:
    process = make(place, "trap 'echo ended; exit 0' TERM; echo begun; sleep 1000 & wait")
    process.poll(print)
    until(lambda: "begun" in process.log.read_text(), "it has begun")
    process.stop(30)
    assert process.log.read_text() == "begun\nended\n"

    stubborn = make(place, "trap '' TERM; echo $$ 0 0 > pids; while true; do sleep 0.1; done")
    stubborn.poll(print)
    pid = pids(place)[0]
    stubborn.stop(0.2)
    assert not is_alive(pid)


def test_a_parent_that_is_killed_leaves_nothing(place: Path) -> None:
    parent = f"""
    import os, time
    from pathlib import Path
    from services.cluster.processes import ManagedProcess
    process = ManagedProcess("part", ["bash", "-c", {FAMILY!r}], Path("log"), lambda: True, "", os.environ)
    while True:
        process.poll(print)
        time.sleep(0.1)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.DEVNULL)
    family = pids(place)
    assert all(map(is_alive, family))
    process.kill()
    process.wait()
    until(lambda: not any(map(is_alive, family)), "all of them are gone", 10)
