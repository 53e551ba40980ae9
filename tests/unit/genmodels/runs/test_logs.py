"""Test that the output of processes reaches storage while they run: complete, bounded, also of a killed process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genmodels.errors import StorageError, StorageUnavailable
from genmodels.runs import logs
from genmodels.runs.control import KILLED
from genmodels.runs.log_lines import log_lines
from genmodels.runs.logs import Spool
from genmodels.runs.metric_rows import metric_rows, training_seconds
from genmodels.runs.store import Run
from genmodels.storage import Storage
from services.local.platform import submit
from tests.support.paths import ROOT
from tests.support.plain_workers import WorkerGroup
from tests.support.storages import FailingStorage, MemoryStorage, Wrapped
from tests.support.tiny_jobs import job, make_data, model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def spool(storage: Storage, source: str = "0") -> Spool:
    return Spool(Run(storage, "j", "m"), 1, source)


def lines(storage: Storage, source: str | None = None) -> list[str]:
    return [line.line for line in log_lines(Run(storage, "j", "m"), source)]


def parts(storage: Storage) -> list[str]:
    return [key for key in storage.list("runs/") if "/logs/" in key]


# ---- the spool


def test_output_becomes_lines_in_immutable_parts(storage: Storage) -> None:
    output = spool(storage)
    assert output.ship()
    assert parts(storage) == []
    output.add(b"one\ntw")
    assert output.ship()
    output.add("o\r\n\nthree \u00e9".encode()[:-1])
    output.add("\u00e9\n".encode()[1:] + b"not \xff ended")
    assert output.ship()
    output.add(b"", ended=True)
    assert output.ship()
    assert len(parts(storage)) == 3
    assert lines(storage) == ["one", "two", "", "three \u00e9", "not \ufffd ended"]
    row = json.loads(storage.get(parts(storage)[0])[0])
    assert set(row) == {"time", "line"}


def test_a_long_line_is_cut_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_LINE", 4)
    storage = MemoryStorage()
    output = spool(storage)
    output.add(b"abcdefghij\nxyz")
    output.add(b"1")  # the line has the maximal length and has not ended
    output.add(b"2\n")
    assert output.ship()
    assert lines(storage) == ["abcd", "efgh", "ij", "xyz1", "2"]


def test_a_part_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 500)
    monkeypatch.setattr("genmodels.runs.parts.MAX_MERGED_BYTES", 500)
    storage = MemoryStorage()
    output = spool(storage)
    output.add(b"".join(b"line %d\n" % i for i in range(100)))
    assert output.ship()
    assert lines(storage) == [f"line {i}" for i in range(100)]
    assert len(parts(storage)) > 10
    assert max(len(storage.get(key)[0]) for key in parts(storage)) < 600


def test_output_that_waits_for_the_store_is_bounded_and_the_gap_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 10_000)
    storage = FailingStorage()
    output = spool(storage)
    output.add(b"before\n")
    assert output.ship()
    storage.away = True
    output.add(b"held\n")
    assert not output.ship()  # the next attempt ships these bytes under the same key
    for i in range(1000):
        output.add(b"line %d\n" % i)
        assert output.size <= 10_000
    assert not output.ship()
    storage.away = False
    assert output.ship()
    shipped = lines(storage)
    kept = [line for line in shipped if line.startswith("line ")]
    missing = 1000 - len(kept)
    assert kept == [f"line {i}" for i in range(missing, 1000)]
    assert 100 < len(kept) < 250
    gap = f"[{missing} lines are missing here: storage did not take them in time]"
    assert shipped[:3] == ["before", "held", gap]


@pytest.mark.parametrize("error", [StorageUnavailable, StorageError])
def test_a_part_whose_answer_was_lost_is_stored_once(error: type[StorageError]) -> None:
    class Lossy(Wrapped):
        lost = 0

        def after(self, verb: str, key: str) -> None:
            if verb == "put" and self.lost < 2:
                self.lost += 1
                raise error(key)

    storage = Lossy()
    output = spool(storage)
    output.add(b"one\n")
    assert not output.ship()
    output.add(b"two\n")
    assert not output.ship()
    assert output.ship()
    assert lines(storage) == ["one", "two"]
    assert len(parts(storage)) == 2


def test_two_processes_of_one_attempt_and_rank_lose_nothing() -> None:
    storage = MemoryStorage()
    first, second = spool(storage), spool(storage)
    first.add(b"one\n")
    assert first.ship()
    second.add(b"two\n")
    assert second.ship()
    first.add(b"three\n")
    assert first.ship()
    assert sorted(lines(storage)) == ["one", "three", "two"]


def test_several_threads_print_and_ship() -> None:
    """No line is lost or doubled between threads that add and threads that ship."""
    storage = MemoryStorage()
    output, ended = spool(storage), threading.Event()

    def ship() -> None:
        while not ended.is_set():
            output.ship()

    shippers = [threading.Thread(target=ship) for _ in range(2)]
    for thread in shippers:
        thread.start()
    for i in range(2000):
        output.add(b"line %d\n" % i)
    ended.set()
    for thread in shippers:
        thread.join()
    assert output.ship()
    assert lines(storage) == [f"line {i}" for i in range(2000)]


# ---- a process

SCRIPT = """
import os, sys, subprocess, threading, time, warnings
from tests.support.storages import FailingStorage
from genmodels.runs import logs
from genmodels.runs.logs import LogShipper
from genmodels.runs.store import Run
from genmodels.storage import open_storage
storage = FailingStorage(open_storage({url!r}))
shipper = LogShipper(Run(storage, "j", "m"), 1, "0")
"""


def script(storage: Storage, body: str) -> subprocess.Popen[str]:
    source = SCRIPT.format(url=storage.url) + body
    return subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_output_of_a_process_is_shipped_and_still_goes_to_its_streams(file_storage: Storage) -> None:
    body = """
logs.FILE_BYTES = 3000
with shipper:
    print("printed")
    sys.stderr.write("an error\\n")
    os.write(1, b"from C\\n")
    subprocess.run(["echo", "a child"])
    for i in range(200):
        print("line", i)
        time.sleep(0.002)
    sys.stdout.write("no end")
print("after")
"""
    process = script(file_storage, body)
    out, err = process.communicate(timeout=60)
    expected = ["printed", "an error", "from C", "a child", *(f"line {i}" for i in range(200)), "no end"]
    assert lines(file_storage) == expected
    assert (process.returncode, err) == (0, "")
    assert out == "\n".join(expected) + "after\n"


def test_an_error_that_ends_a_process_is_in_its_log(file_storage: Storage) -> None:
    process = script(file_storage, "with shipper:\n    raise ValueError('the last word')\n")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert lines(file_storage)[-1] == "ValueError: the last word"
    assert "ValueError: the last word" in out


def test_a_crash_leaves_its_stack_on_the_original_stream(file_storage: Storage) -> None:
    process = script(file_storage, "with shipper:\n    print('hello')\n    time.sleep(1)\n    os.abort()\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert out == "hello\n"
    assert "Fatal Python error: Aborted" in err


@pytest.mark.slow
@pytest.mark.parametrize("away", ["refuses", "hangs"])
def test_an_unreachable_store_delays_the_end_for_a_bounded_time(file_storage: Storage, away: str) -> None:
    body = f"""
logs.CLOSE_SECONDS, logs.SHIP_SECONDS = 1.0, 0.1
def hang(verb, key):
    storage.refused += 1
    time.sleep(3600)
if {away!r} == "hangs":
    storage.before = hang
with shipper:
    print("kept", flush=True)
    storage.away = True
    while not storage.refused:
        print("more")
        time.sleep(0.01)
    began = time.monotonic()
print(time.monotonic() - began)
"""
    process = script(file_storage, body)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("kept\nmore\n")
    assert 0.9 < float(out.splitlines()[-1]) < 3


# ---- groups


@pytest.mark.slow
def test_logs_of_a_killed_rank_and_of_its_peer(data: Path, file_storage: Storage) -> None:
    """kill -9: the rank's output up to 2 s before is stored without a gap; its peer's log is complete."""
    name = submit(
        file_storage, job("logs", model(data, "minigpt", max_steps=10**6, eval_every=10**6, save_every=10**6))
    )
    run = Run(file_storage, name, "minigpt")
    with WorkerGroup(2, file_storage.url, [(name, "minigpt", 1)], faults={0: "print@1", 1: "print@1"}) as group:
        until(lambda: len(file_storage.list(f"{run.prefix}/attempt-1/logs/1/")) >= 2)
        killed_at = time.time()
        os.kill(group.processes[1].pid, signal.SIGKILL)
        codes = group.wait()
        printed = group.logs[0].read_text().splitlines()
    assert codes[0] != 0
    log = [line.line for line in log_lines(run, "1")]
    assert log[0] == "INFO:genmodels.training.attempt:attempt 1, rank 1 of 2: begins"
    steps = [line.split() for line in log if line.startswith("rank 1 step")]
    assert [int(words[3]) for words in steps] == list(range(1, len(steps) + 1))
    assert float(steps[-1][5]) > killed_at - logs.SHIP_SECONDS - logs.COPY_SECONDS - 2.0  # the last for slow machines
    of_peer = [line.line for line in log_lines(run, "0")]
    assert of_peer == [line for line in printed if line in set(of_peer)]
    steps_of_peer = [line for line in of_peer if line.startswith("rank 0")]
    assert steps_of_peer == [line for line in printed if line.startswith("rank 0")]
    assert any("RuntimeError" in line for line in of_peer)
    merged = list(log_lines(run))
    assert {line.source for line in merged} == {"0", "1"}
    assert [line.time for line in merged] == sorted(line.time for line in merged)


@pytest.mark.slow
def test_a_kill_command_leaves_the_stacks_of_ranks_that_hang(data: Path, file_storage: Storage) -> None:
    """Rank 0 waits in a collective, rank 1 sleeps in Python, rank 2 is stopped: ranks 0 and 1 can still print."""
    name = submit(file_storage, job("hang", model(data, "minigpt", max_steps=100, eval_every=100, save_every=100)))
    run = Run(file_storage, name, "minigpt")
    with WorkerGroup(3, file_storage.url, [(name, "minigpt", 1)], faults={1: "sleep@5", 2: "stop@5"}) as group:
        until(lambda: (heartbeat := run.heartbeat(1)) is not None and heartbeat.step == 4)
        run.send_command("kill", 1, "no progress for 120 s", then="cancelled")
        codes = [group.processes[rank].wait(30) for rank in (0, 1)]
        assert group.processes[2].poll() is None
    assert codes[1] == KILLED
    assert codes[0] != 0
    stacks = {rank: "\n".join(line.line for line in log_lines(run, rank)) for rank in ("0", "1")}
    for stack in stacks.values():
        assert "Killed: no progress for 120 s. The stacks of all threads:" in stack
    assert "in faulty" in stacks["1"]
    assert "in from_rank_0" in stacks["0"]
    assert run.checkpoints() == []
    heartbeat = run.heartbeat(1)
    assert heartbeat is not None
    assert (heartbeat.phase, heartbeat.step) == ("training", 4)
    assert heartbeat.step_seconds is not None


@pytest.mark.slow
def test_output_of_an_attempt_that_wakes_after_a_pause_is_not_read(data: Path, file_storage: Storage) -> None:
    """SIGSTOP after the checkpoint at step 4; another attempt runs to the end; SIGCONT."""
    settings = {"max_steps": 12, "save_every": 4, "eval_every": 4}
    name = submit(file_storage, job("paused", model(data, "minigpt", **settings)))
    run = Run(file_storage, name, "minigpt")
    with WorkerGroup(1, file_storage.url, [(name, "minigpt", 1)], faults={0: "wait@7"}) as paused:
        until(lambda: run.checkpoints() and len(list(metric_rows(run))) == 6)
        until(lambda: any("step 4 of 12" in line.line for line in log_lines(run)))  # before SIGCONT
        os.kill(paused.processes[0].pid, signal.SIGSTOP)
        with WorkerGroup(1, file_storage.url, [(name, "minigpt", 2)]) as group:
            group.succeed()

        def read() -> object:
            return list(metric_rows(run)), run.checkpoints(), run.samples(), list(log_lines(run)), training_seconds(run)

        before = read()
        paused.go_on()
        os.kill(paused.processes[0].pid, signal.SIGCONT)
        assert paused.wait() == [1]
        assert "genmodels.errors.Superseded: attempt 2 of " in paused.logs[0].read_text()
    assert read() == before
    folder = f"{run.prefix}/attempt-1"
    rows = "".join(file_storage.get(key)[0].decode() for key in file_storage.list(f"{folder}/metrics/")).splitlines()
    assert len(rows) > 6, "it wrote after it woke"
    late = "".join(file_storage.get(key)[0].decode() for key in file_storage.list(f"{folder}/logs/0/"))
    assert "Superseded" in late, "its last words are kept"
    assert [ref.attempt for ref in run.checkpoints()] == [1, 2, 2]
    assert [row["step"] for row in metric_rows(run)] == list(range(1, 13))
    assert not file_storage.exists(f"{folder}/checkpoints/step-00000008/manifest.json")
    messages = [(line.attempt, line.line.rpartition(":")[2]) for line in log_lines(run) if "rank 0 of 1" in line.line]
    assert messages == [(1, " begins"), (2, " continues from step 4 of attempt 1")]


def until(condition: Callable[[], object], timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
