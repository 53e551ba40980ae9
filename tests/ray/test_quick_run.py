"""Test `genmodels run` on a real Ray: a worker is killed, the command is started a second time, Ctrl-C is pressed.

Folder and environment have everything that could break child processes: odd names, proxies, modules like `torch.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from genmodels.registry.store import Registry
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.spec.parse import job_id
from genmodels.storage import open_storage
from services.cluster.environment import python
from services.local.platform import submit
from tests.support.plain_workers import WorkerGroup
from tests.support.spec_files import read_spec
from tests.support.tiny_jobs import make_data, model

pytestmark = pytest.mark.timeout(900)  # on a busy machine a worker group may need half a minute to start

STEPS = 600
HOSTILE = dict.fromkeys(
    ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY"), "http://127.0.0.1:9"
) | {
    "NO_PROXY": "",
    "PYTHONIOENCODING": "latin-1",
    "PYTHONPATH": "",
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Make a folder with data and a job of two models: a long one, and one that cannot pass its gate.

    The folder also has modules whose names child processes import, and a folder like a clone of this project.
    """
    tmp_path = tmp_path / "my [red]plays# 100%25 ä"
    (tmp_path / "genmodels" / "genmodels").mkdir(parents=True)
    for name in ("logging", "random", "torch", "ray", "services"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user was imported')")
    data = make_data(tmp_path)
    long = model(data, "vae", "steady", max_steps=STEPS, save_every=50, eval_every=STEPS, log_every=10, ema=None)
    short = model(data, "minigpt", "hopeless", max_steps=4, save_every=4)
    short["serve"] = {"gate": {"metric": "val_loss", "max": 0.001}}
    for entry in (long, short):
        entry["scaling"] = {"num_workers": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "test", "models": [long, short]}))
    return tmp_path


def test_killed_interrupted_and_run_again(workplace: Path) -> None:
    spec = read_spec(workplace / "job.yaml")
    job = job_id(spec)
    storage = open_storage((workplace / ".genmodels").as_uri())
    run = Run(storage, job, "steady")

    with Command(workplace) as first:
        until(lambda: run.checkpoints(), first)
        with Command(workplace, "--exit") as second:
            until(lambda: "is already running in process" in second.output(), second)
            worker = first.find("RayTrainWorker")[-1]
            os.kill(worker, signal.SIGKILL)
            until(lambda: 2 in run.started() and len(run.checkpoints()) > len_at_takeover(run), first)
            assert not second.find("raylet")  # the second command only follows the job
            first.interrupt()
            assert first.process.wait(90) == 130, first.output()
            until(lambda: not first.find(""), first, timeout=20)
            workers = workers_until_the_end_of(second, 240)
            assert second.process.wait() == 1, second.output()  # one model did not pass its gate
            printed = second.output()
    assert len(workers) == 2, "one group of two workers trained both models"
    assert "The other command has ended; this command continues the job." in printed
    history = run.status()[0].history
    stop = next(i for i, change in enumerate(history) if "Ctrl-C" in change.reason)
    assert history[stop].state == "queued"
    assert [change.state for change in history[:stop]].count("starting") == 2
    assert "a worker was lost" in " ".join(change.reason for change in history[:stop])
    assert "steady" in printed
    assert "Traceback" not in printed
    assert "hopeless: failed: not published: val_loss" in printed
    assert Registry(storage).models() == ["steady"]
    for name in ("samples", "reconstructions", "interpolation", "curves"):
        picture = workplace / "samples" / job / f"steady-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(Path("samples") / job / picture.name) in printed
    assert run.status()[0].state == "succeeded"
    assert [row["step"] for row in metric_rows(run)] == sorted({row["step"] for row in metric_rows(run)})

    # Killed, interrupted and resumed under Ray, or undisturbed in plain processes: the same bits.
    # So are those of the model that the group of workers trained after another one.
    calm = open_storage((workplace / "calm").as_uri())
    assert submit(calm, spec) == job
    assert len(run.chain()) >= 2
    for name in ("steady", "hopeless"):
        with WorkerGroup(2, calm.url, [(job, name, 1)]) as group:
            group.succeed()
        files = [
            {file: facts.sha256 for file, facts in one.manifest(one.checkpoints()[-1]).files.items()}
            for one in (Run(storage, job, name), Run(calm, job, name))
        ]
        assert files[0] == files[1]


class Command:
    """Run `genmodels run job.yaml` in its own session, as a terminal does."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.mark = f"GENMODELS_TEST={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.log = folder / f"{value}.log"
        temporary = folder.parent / ("x" * 100)
        temporary.mkdir(exist_ok=True)
        command = python("cli.main", "run", "job.yaml", "--no-auth", "--port", str(port), *options)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **HOSTILE, "TMPDIR": str(temporary), name: value},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.find(""):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def interrupt(self) -> None:
        """Send SIGINT to every process of the foreground group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def find(self, title: str) -> list[int]:
        """Return living processes that this command started, directly or not, whose command line contains `title`."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                mine = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                if mine and title.encode() in (folder / "cmdline").read_bytes() and (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                continue
        return sorted(pids)

    def output(self) -> str:
        return self.log.read_text("latin-1")


def workers_until_the_end_of(command: Command, timeout: float) -> set[int]:
    """Wait for the end of a command; return the workers of Ray Train that it had."""
    workers = set[int]()

    def ended() -> bool:
        workers.update(command.find("RayTrainWorker"))
        return command.process.poll() is not None

    until(ended, command, timeout)
    return workers


def len_at_takeover(run: Run) -> int:
    """Return the number of checkpoints of the first attempt."""
    return sum(ref.attempt == 1 for ref in run.checkpoints())


def until(condition: Callable[[], object], command: Command, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, command.output()
        time.sleep(0.1)


def test_missing_data_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    entry = {"name": "x", "model": {"family": "vae"}, "data": {"path": "./nowhere"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "test", "models": [entry]}))
    with Command(tmp_path) as command:
        assert command.process.wait(60) == 2
        (line,) = command.output().splitlines()
    assert line.startswith("error: models[0].data.path: ")
    assert "does not exist" in line
    assert not (tmp_path / ".genmodels").exists()
