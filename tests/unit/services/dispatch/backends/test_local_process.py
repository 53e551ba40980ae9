"""Test drivers that are processes of this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.dispatch.backends import base, local_process
from services.dispatch.backends.base import LOST, Capacity
from services.dispatch.backends.local_process import SubprocessBackend
from tests.support.driver_commands import command, end_of
from tests.support.live_processes import is_alive
from tests.support.ray_node import until


def test_a_driver_as_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "bash", "-c", "echo $GREETING; exit 3")
    backend = SubprocessBackend(tmp_path / "logs", {"GREETING": "hello"}, Capacity(3, 1))
    assert end_of(backend.start("file:///s", "j", "m", 2, 1)) == 3
    assert backend.log("m", 2).read_text() == "hello\n"
    assert backend.find("j", "m", 2).poll() == 3
    assert backend.capacity() == Capacity(3, 1)
    unknown = backend.find("j", "m", 3)
    unknown.kill()
    assert unknown.poll() == LOST


def test_a_killed_process_takes_its_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "bash", "-c", "sleep 1000 & echo $!; wait")
    backend = SubprocessBackend(tmp_path, {})
    driver = backend.start("file:///s", "j", "m", 1, 1)
    child = int(until(lambda: backend.log("m", 1).read_text(), "the child starts"))
    assert driver.poll() is None
    driver.kill()
    assert driver.poll() == -signal.SIGKILL
    until(lambda: not is_alive(child), "the child is gone", 5)


def test_no_driver_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    program = """
    import time
    from pathlib import Path
    from services.dispatch.backends import local_process
    local_process.turns_command = lambda *_: ["bash", "-c", "echo $$; exec sleep 1000"]
    backend = local_process.SubprocessBackend(Path(), {})
    backend.start("file:///s", "j", "m", 1, 1)
    time.sleep(1000)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path)
    log = SubprocessBackend(tmp_path, {}).log("m", 1)
    driver = int(until(lambda: log.exists() and log.read_text(), "the driver starts", 30))
    assert is_alive(driver)
    process.kill()
    process.wait()
    until(lambda: not is_alive(driver), "the driver is gone", 15)


def test_arguments_of_a_driver() -> None:
    words = base.driver_command("s3://b/p q", "j-1", "m", 2, 3)
    assert (
        " ".join(words[1:]) == "-P -m services.train --storage s3://b/p q --job j-1 --model m --attempt 2 --workers 3"
    )
    assert "s3://b/p q" in words


# attempts in turn

DRIVER = """
import json, os, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
for line in channel.makefile("rb"):
    turn = json.loads(line)
    print(turn["model"], turn["attempt"], os.getpid(), flush=True)
    if turn["model"] == "bad":
        sys.exit(3)
    if turn["model"] == "slow":
        import time; time.sleep(1000)
    channel.sendall(b"{}\\n")
print("ends", flush=True)
"""


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SubprocessBackend]:
    monkeypatch.setattr(local_process, "turns_command", lambda number: [sys.executable, "-c", DRIVER, str(number)])
    backend = SubprocessBackend(tmp_path / "logs", {})
    yield backend
    for process in backend._processes():
        process.kill()


def start(backend: SubprocessBackend, model: str) -> local_process._Turn:
    driver = backend.start("file:///s", "j", model, 1, 1)
    assert isinstance(driver, local_process._Turn)
    return driver


def test_a_driver_that_ended_well_takes_the_next_attempt(backend: SubprocessBackend) -> None:
    first = start(backend, "a")
    assert end_of(first) == 0
    second = start(backend, "b")
    assert end_of(second) == 0
    assert first.process is second.process
    assert [line.split()[:2] for line in backend.log("a", 1).read_text().splitlines()] == [["a", "1"], ["b", "1"]]
    assert backend.find("j", "a", 1).poll() == 0


def test_a_driver_whose_attempt_failed_takes_no_other(backend: SubprocessBackend) -> None:
    bad = start(backend, "bad")
    assert end_of(bad) == 3
    next_one = start(backend, "a")
    assert end_of(next_one) == 0
    assert next_one.process is not bad.process


def test_the_end_of_an_earlier_attempt_does_not_end_the_driver_of_the_next(backend: SubprocessBackend) -> None:
    first = start(backend, "a")
    assert end_of(first) == 0
    second = start(backend, "slow")
    first.kill()
    assert second.poll() is None
    second.kill()
    assert second.poll() == -signal.SIGKILL
    assert first.poll() == 0
    assert end_of(start(backend, "b")) == 0


def test_drivers_that_work_at_the_same_time_are_different_ones(backend: SubprocessBackend) -> None:
    slow, other = start(backend, "slow"), start(backend, "a")
    assert slow.process is not other.process
    assert end_of(other) == 0
    assert start(backend, "b").process is other.process


@pytest.mark.parametrize("changed", ["code", "environment"])
def test_after_a_change_an_idle_driver_is_ended(
    backend: SubprocessBackend, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(backend, "a")
    assert end_of(first) == 0
    if changed == "code":
        monkeypatch.setattr(local_process, "_code", lambda: 0)
    else:
        backend.environment["ANOTHER"] = "1"
    assert start(backend, "b").process is not first.process
    assert first.process._popen.wait(30) == 0
    assert "ends" in backend.log("a", 1).read_text()


def test_an_idle_driver_is_ended_after_a_while(backend: SubprocessBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_process, "IDLE_SECONDS", 0.1)
    first = start(backend, "a")
    assert end_of(first) == 0
    assert first.process._popen.wait(30) == 0
    second = start(backend, "b")
    assert end_of(second) == 0
    assert first.process is not second.process


def test_a_driver_that_died_while_idle_takes_no_attempt(backend: SubprocessBackend) -> None:
    first = start(backend, "a")
    assert end_of(first) == 0
    first.process._popen.kill()
    first.process._popen.wait()
    assert end_of(start(backend, "b")) == 0
