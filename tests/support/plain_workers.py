"""Run worker groups as plain processes with a gloo process group, for tests that are not about Ray.

    python -m tests.support.plain_workers RANK WORLD_SIZE DEVICE STORE_FILE STORAGE_URL FAULT JOB:MODEL:ATTEMPT ...

Each process carries out the attempts one after the other, in the same process group. FAULT is "", or what the rank does
before a step: `sleep@5` hangs for ever before step 5, `wait@5` until `WorkerGroup.go_on`, `stop@5` stops its process,
`print@1` prints a line before every step.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

PROGRAM = "tests.support.plain_workers"


class WorkerGroup:
    """Start `world_size` processes that carry out attempts; `wait` for them, or kill one.

    Args:
        faults: the fault of each rank.
    """

    def __init__(
        self,
        world_size: int,
        storage_url: str,
        attempts: list[tuple[str, str, int]],
        device: str = "cpu",
        faults: Mapping[int, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="gloo-")
        tasks = [":".join(map(str, attempt)) for attempt in attempts]
        self.logs = [Path(self.folder.name) / f"{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            command = [
                sys.executable,
                "-m",
                PROGRAM,
                str(rank),
                str(world_size),
                device,
                f"{self.folder.name}/store",
                storage_url,
                (faults or {}).get(rank, ""),
                *tasks,
            ]
            with log.open("wb") as output:
                self.processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for all processes; return their exit codes."""
        return [process.wait(timeout) for process in self.processes]

    def go_on(self) -> None:
        """Let ranks with the fault `wait` continue."""
        Path(self.folder.name, "go").touch()

    def succeed(self, timeout: float = 120) -> None:
        codes = self.wait(timeout)
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in self.logs)


def main() -> None:
    import torch
    import torch.distributed as dist

    from genmodels.storage import open_storage
    from genmodels.training.attempt import work
    from genmodels.training.group import Group

    rank, world_size, device, store, storage_url, fault, *tasks = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    group = Group(
        int(rank), int(world_size), torch.device(device, int(rank)) if device == "cuda" else torch.device(device)
    )
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=60),
    )
    if fault:
        how, at = fault.split("@")
        go_wrong(how, at, Path(store).with_name("go"))
    for task in tasks:
        job, model, attempt = task.split(":")
        work(open_storage(storage_url, in_use=True), job, model, int(attempt), group)
    dist.destroy_process_group()


def go_wrong(how: str, at: str, go: Path) -> None:
    """Inject a fault between two steps: where the next step takes its data."""
    from genmodels.training import loop

    healthy = loop.micro_batches

    def faulty(split: Any, config: Any, samples: int, group: Any) -> Iterator[Any]:
        step = samples // config.batch_size + 1
        if how == "print" and step >= int(at):
            print(f"rank {group.rank} step {step} time {time.time()}")
        elif how == "sleep" and step == int(at):
            time.sleep(3600)
        elif how == "wait" and step == int(at):
            while not go.exists():
                time.sleep(0.01)
        elif how == "stop" and step == int(at):
            os.kill(os.getpid(), signal.SIGSTOP)
        return healthy(split, config, samples, group)

    loop.micro_batches = faulty


if __name__ == "__main__":
    main()
