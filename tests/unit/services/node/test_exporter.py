"""Test a node's metrics: each value of its processes once, and no gauge of a run that has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from genmodels.metrics import DIRECTORY
from services.cluster.ports import free_ports
from services.node.exporter import NodeCollector
from tests.support.ray_node import until

# Counts as often as a line of its input says, then waits for the next line.
WRITER = """
import sys
from genmodels import metrics
job = sys.argv[1]
metrics.TRAINING_LOSS.labels(job, "digits", "vae", "model").set(0.5)
metrics.KV_SLOTS.labels("m", "minigpt", "1", "used").set(2)
for line in sys.stdin:
    for _ in range(int(line)):
        metrics.ATTEMPTS.labels("stopped").inc()
        metrics.STORAGE_SECONDS.labels("get").observe(0.002)
    print("counted", flush=True)
"""

# Collect, killed before the first operation on a file, then before the second, ...; print the exit codes.
KILLED = """
import os, pathlib, shutil, signal, sys
from services.node.exporter import NodeCollector
FILES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "mmap.__new__")
folder, code, moment = pathlib.Path(sys.argv[1]), -1, 0
def watch(event, arguments):
    global moment
    if event in FILES and (event == "mmap.__new__" or str(work) in str(arguments[0])):
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moment -= 1
while code:
    work = folder / f"work-{moment}"
    shutil.copytree(folder, work, ignore=shutil.ignore_patterns("work-*"))
    child = os.fork()
    if not child:
        collector = NodeCollector(work)
        sys.addaudithook(watch)
        list(collector.collect())
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(work.name, code, flush=True)
    moment += 1
"""


class Writer:
    def __init__(self, folder: Path, job: str = "j") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, DIRECTORY: str(folder)},
        )  # fmt: skip

    def count(self, times: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "counted\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Writer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Writer] = []

    def start(job: str = "j") -> Writer:
        started.append(Writer(tmp_path, job))
        return started[-1]

    yield start
    for writer in started:
        writer.kill()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    port = free_ports(1)
    environment = {**os.environ, DIRECTORY: str(tmp_path)}
    command = [sys.executable, "-m", "services.node.exporter", "--port", str(port)]
    with subprocess.Popen(command, env=environment) as process:
        url = f"http://127.0.0.1:{port}/metrics"
        try:
            until(lambda: answers(url), "the exporter answers")
            yield url
        finally:
            process.terminate()
    assert process.returncode == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def scrape(url: str) -> dict[str, float]:
    text = httpx.get(url, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    series = {_name(sample.name, sample.labels): sample.value for sample in samples}
    assert len(series) == len(samples), "each series once"
    return series


def collected(folder: Path) -> dict[str, float]:
    samples = [sample for metric in NodeCollector(folder).collect() for sample in metric.samples]
    return {_name(sample.name, sample.labels): sample.value for sample in samples}


def _name(name: str, labels: dict[str, str]) -> str:
    values = ",".join(value for _, value in sorted(labels.items()))
    return f"{name.removeprefix('genmodels_')}{{{values}}}"


COUNT, SLOTS = "attempts_ended_total{stopped}", "kv_slots{minigpt,m,used,1}"


def of(count: int) -> dict[str, float]:
    """Return the expected samples after `count` counts, without the sums of seconds."""
    buckets = {bound: count if float(bound) >= 0.002 else 0 for bound in ("0.001", "0.0025", "60.0", "+Inf")}
    return {COUNT: count, "storage_seconds_count{get}": count} | {
        f"storage_seconds_bucket{{{bound},get}}": value for bound, value in buckets.items()
    }


def test_counts_outlive_their_process_and_gauges_do_not(url: str, tmp_path: Path, start: Start) -> None:
    a, b = start("a"), start("b")
    a.count(3)
    b.count(4)
    scraped = scrape(url)
    assert of(7).items() <= scraped.items()
    assert scraped["training_loss{vae,a,digits,model}"] == scraped["training_loss{vae,b,digits,model}"] == 0.5
    assert scraped[SLOTS] == 4
    a.kill()
    scraped = scrape(url)
    assert of(7).items() <= scraped.items()
    assert scraped["storage_seconds_sum{get}"] == pytest.approx(0.014)
    assert "training_loss{vae,a,digits,model}" not in scraped
    assert scraped["training_loss{vae,b,digits,model}"] == 0.5
    assert scraped[SLOTS] == 2
    b.count(1)
    b.kill()
    start("c").count(2)
    assert of(10).items() <= scrape(url).items()
    assert not [*tmp_path.glob(f"*_{a.process.pid}-*"), *tmp_path.glob(f"*_{b.process.pid}-*")]


@pytest.mark.slow
def test_processes_die_while_many_scrape(url: str, start: Start) -> None:
    counted = 0
    with ThreadPoolExecutor(4) as threads:
        stop = False

        def go_on(_: int) -> list[float]:
            counts = []
            while not stop:
                counts.append(scrape(url).get(COUNT, 0.0))
            return counts

        scrapes = threads.map(go_on, range(4))
        try:
            for _ in range(4):
                writers = [start() for _ in range(2)]
                for writer in writers:
                    writer.count(100)
                    counted += 100
                    writer.kill()
        finally:
            stop = True
        for counts in scrapes:
            assert counts == sorted(counts), "no count ever falls"
            assert counts[-1] <= counted
    assert of(counted).items() <= scrape(url).items()


@pytest.mark.slow
def test_the_exporter_is_killed_at_every_moment_of_folding(tmp_path: Path, start: Start) -> None:
    alive = start()
    alive.count(1)
    counted = 1
    for count in (10, 100, 1000):  # the first two are already folded, one after the other; the last two are not
        for _ in range(2 if count == 1000 else 1):
            dead = start()
            dead.count(count)
            dead.kill()
            counted += count
        if count < 1000:
            assert collected(tmp_path)[COUNT] == counted
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True)
    *killed, last = [line.split() for line in done.stdout.splitlines()]
    assert last[1] == "0"
    assert {code for _, code in killed} == {"-9"}
    assert len(killed) > 20
    leftovers = set()
    for name, _ in [*killed, last]:
        work = tmp_path / name
        leftovers.add(tuple(sorted(str(path.relative_to(work)) for path in work.rglob("*"))))
        for _ in range(2):
            scraped = collected(work)
            assert of(counted).items() <= scraped.items(), name
            assert scraped[SLOTS] == 2, name
    assert len(leftovers) > 10, "moments differ"


def test_a_pid_that_another_process_has_now(tmp_path: Path, start: Start) -> None:
    writer = start()
    writer.count(5)
    writer.kill()
    alive = start()
    alive.count(2)
    for path in tmp_path.glob(f"*_{writer.process.pid}-*.db"):
        path.rename(path.with_name(path.name.replace(f"_{writer.process.pid}-", f"_{alive.process.pid}-1")))
    for _ in range(2):
        scraped = collected(tmp_path)
        assert of(7).items() <= scraped.items()
        assert scraped[SLOTS] == 2


def test_files_do_not_pile_up_where_nobody_scrapes(tmp_path: Path, start: Start) -> None:
    node = NodeCollector(tmp_path)
    sizes = []
    for _ in range(3):
        writer = start()
        writer.count(1)
        writer.kill()
        node.fold()
        sizes.append(len([path for path in tmp_path.rglob("*") if path.is_file()]))
    assert sizes[0] == sizes[1] == sizes[2]
    assert of(3).items() <= collected(tmp_path).items()


def test_a_file_that_was_spoiled_or_just_opened_stands_in_nobodys_way(tmp_path: Path, start: Start) -> None:
    start().count(3)
    (tmp_path / f"counter_{os.getpid()}.db").touch()
    (tmp_path / "histogram_1-1.db").write_bytes(b"\xff\x00\x00\x00" + b"x" * 400)
    assert of(3).items() <= collected(tmp_path).items()


def test_without_an_exporter_nothing_is_written(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != DIRECTORY}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRITER, "a-1"],
        cwd=tmp_path, env=environment, input="1\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("counted\n", "", [])
