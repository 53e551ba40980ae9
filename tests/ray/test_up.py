"""Test `genmodels up` with its real processes: kill each in turn, then end the platform in two ways."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from genmodels.errors import GenmodelsError
from genmodels.runs.jobs import Jobs
from genmodels.runs.store import Run
from genmodels.storage import Storage, open_storage
from services.cluster.ports import free_ports
from services.local.up import Options, up
from tests.support.ray_node import until
from tests.support.tiny_jobs import job, make_data, model

PARTS = ("ray", "jobs", "gateway", "exporter")


def test_everything_is_killed_in_turn(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "storage").as_uri())
    entry = model(make_data(tmp_path), "vae", "steady", max_steps=100_000, save_every=50, eval_every=100_000)
    name, _ = Jobs(storage).submit(job("test", entry))
    run = Run(storage, name, "steady")

    with Platform(tmp_path, storage) as platform:
        platform.is_up()
        token = Path(re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", platform.output())[-1])
        assert token.stat().st_mode & 0o777 == 0o400
        assert all(token.read_text() not in arguments for arguments in platform.processes().values())
        until(run.checkpoints, "a checkpoint")
        until(lambda: platform.metric("training_checkpoint_step", name), "the exporter sees the run")
        assert platform.metric("training_mfu_ratio", name)
        saved = until(lambda: platform.metric("checkpoint_seconds_count", "vae"), "its checkpoints are counted")
        until(lambda: len(platform.find("ServeReplica")) == 2, "gateway and host run")
        replicas = platform.find("ServeReplica")

        # Services end and restart; what runs in Ray continues.
        for part, module in (("exporter", "node.exporter"), ("gateway", "gateway.deploy"), ("jobs", "jobs")):
            os.kill(platform.find(f"-m services.{module}", "services.cluster.reaper")[0], signal.SIGKILL)
            assert httpx.get(f"{platform.gateway}/healthz", trust_env=False).status_code == 200
            platform.comes_back(part)
        assert platform.find("ServeReplica") == replicas
        assert run.started() == [1]

        # A changed file of the pools starts and stops the hosts of its pool; no other replica restarts.
        platform.pools.write_text("pools: [{name: default}, {name: more}]")
        until(lambda: len(platform.find("ServeReplica")) == 3, "the new pool has a host")
        assert {*replicas} < {*platform.find("ServeReplica")}
        platform.pools.write_text("pools: [{name: default}]")
        until(lambda: platform.find("ServeReplica") == replicas, "the host of the old pool is gone")

        # Everything in Ray ends with the head; the next head finds the work in the storage.
        steps = len(run.checkpoints())
        os.kill(platform.find("gcs_server")[0], signal.SIGKILL)
        platform.comes_back("ray")
        until(lambda: answers(f"{platform.gateway}/healthz"), "the gateway is deployed again", 120)
        until(lambda: 2 in run.started() and run.checkpoints()[-1].attempt == 2, "the run goes on", 120)
        assert len(run.checkpoints()) >= min(steps, 3)
        assert (platform.metric("checkpoint_seconds_count", "vae") or 0) > saved, "what dead workers counted stays"

        # Ctrl-C: attempts save and stop; no process stays.
        before = platform.processes()
        platform.process.send_signal(signal.SIGINT)
        assert platform.process.wait(90) == 0, platform.output()
        until(lambda: not alive(before), "every process is gone", 10)
    result = run.result(2)
    assert result is not None
    assert (result.outcome, result.step) == ("stopped", run.checkpoints()[-1].step)
    assert not token.exists()

    # The same ports can be used at once; after kill -9 no process stays.
    with Platform(tmp_path, storage, platform) as again:
        until(lambda: run.started()[-1] == 3, "the run goes on", 120)
        before = again.processes()
        again.process.kill()
        until(lambda: not alive(before), "every process is gone", 15)


def test_a_service_without_any_key_does_not_start(file_storage: Storage) -> None:
    with pytest.raises(GenmodelsError, match=r"genmodels keys create .*--no-auth"):
        up(file_storage, Options())


@pytest.mark.parametrize("option", ["port", "api_port", "metrics_port"])
def test_a_port_that_is_taken_is_named(option: str, file_storage: Storage) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first = free_ports(3)
        options = {"port": first, "api_port": first + 1, "metrics_port": first + 2} | {option: port}
        with pytest.raises(GenmodelsError, match=f"port {port} of .* is taken.*--{option.replace('_', '-')}"):
            up(file_storage, Options(auth=False, **options))


class Platform:
    """Run `genmodels up` as a process, on new ports or on those of another platform."""

    def __init__(self, folder: Path, storage: Storage, like: Platform | None = None) -> None:
        first: int = like.first if like else free_ports(3)
        self.first: int = first
        self.gateway = f"http://127.0.0.1:{first}"
        self.log = folder / f"up-{time.monotonic_ns()}.log"
        command = [
            sys.executable,
            "-m",
            "services.cli.main",
            "up",
            "--storage",
            storage.url,
            "--no-auth",
            "--num-cpus",
            "2",
        ]
        self.pools = folder / "pools.yaml"
        self.pools.write_text("pools: [{name: default}]")
        command += ["--pools", str(self.pools)]
        ports = ["--port", str(first), "--api-port", str(first + 1), "--metrics-port", str(first + 2)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *ports, "--logs", str(folder / "logs")],
                cwd=folder,
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Platform:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            before = self.processes()
            self.process.kill()
            self.process.wait()
            until(lambda: not alive(before), "every process is gone", 15)
        for folder in re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)/token", self.output()):
            shutil.rmtree(folder, ignore_errors=True)  # after kill -9 no other process removes it

    def metric(self, name: str, label: str) -> float | None:
        """Return the value of a series of the exporter that has this label value."""
        text = httpx.get(f"http://127.0.0.1:{self.first + 2}/metrics", trust_env=False).text
        match = re.search(rf'^genmodels_{name}{{[^}}]*"{label}"[^}}]*}} (\S+)$', text, re.M)
        return float(match[1]) if match else None

    def output(self) -> str:
        return self.log.read_text()

    def is_up(self) -> None:
        self.wait_for("Everything is up", 1, 120)
        for part in PARTS:
            assert re.search(rf"^{part} +http://127\.0\.0\.1:\d+\S* +ready after \d+ s$", self.output(), re.M)

    def comes_back(self, part: str) -> None:
        self.wait_for(rf"^{part} +(was ended|ended)", 1, 20)
        self.wait_for(rf"^{part} +http", 2, 90)

    def wait_for(self, pattern: str, times: int, seconds: float) -> None:
        def logged() -> bool:
            assert self.process.poll() is None, self.output()
            return len(re.findall(pattern, self.output(), re.M)) >= times

        until(logged, pattern, seconds)

    def processes(self) -> dict[tuple[int, str], str]:
        """Return (pid, time of its start) -> command line, for all processes that the command started."""
        processes = {pid: fields for pid, fields in _table().items() if fields[0] != "Z"}
        tree = {self.process.pid}
        while more := {pid for pid, (_, parent, _, _) in processes.items() if parent in tree and pid not in tree}:
            tree |= more
        return {(pid, processes[pid][2]): processes[pid][3] for pid in tree if pid in processes}

    def find(self, mark: str, but: str = "\0") -> list[int]:
        return sorted(pid for (pid, _), words in self.processes().items() if mark in words and but not in words)


def alive(processes: dict[tuple[int, str], str]) -> list[str]:
    now = {(pid, began) for pid, (state, _, began, _) in _table().items() if state != "Z"}
    return [words for process, words in processes.items() if process in now]


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _table() -> dict[int, tuple[str, int, str, str]]:
    """Return pid -> (state, parent, time of its start, command line)."""
    table = {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_text().replace("\0", " ")
            table[int(folder.name)] = (fields[0], int(fields[1]), fields[19], words)
        except (OSError, ValueError):
            continue
    return table
