"""Test drivers that are processes of this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from services.dispatch.backends import base
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
    local_process.driver_command = lambda *_: ["bash", "-c", "echo $$; exec sleep 1000"]
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
