"""Worker groups as plain processes with a gloo process group: what is not about Ray is tested with these.

    python plain_workers.py RANK WORLD_SIZE DEVICE STORE_FILE STORAGE_URL JOB:MODEL:ATTEMPT ...

Each process carries out the attempts one after the other, in the same process group.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path


class WorkerGroup:
    """`world_size` processes that carry out attempts; `wait` for them, or kill one."""

    def __init__(
        self, world_size: int, storage_url: str, attempts: list[tuple[str, str, int]], device: str = "cpu"
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="gloo-")
        tasks = [":".join(map(str, attempt)) for attempt in attempts]
        self.logs = [Path(self.folder.name) / f"{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            command = [
                sys.executable,
                __file__,
                str(rank),
                str(world_size),
                device,
                f"{self.folder.name}/store",
                storage_url,
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
        """Exit codes of all processes."""
        return [process.wait(timeout) for process in self.processes]

    def succeed(self, timeout: float = 120) -> None:
        codes = self.wait(timeout)
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in self.logs)


def main() -> None:
    import torch
    import torch.distributed as dist

    from genmodels.attempt import run_attempt
    from genmodels.storage import open_storage
    from genmodels.train import Group

    rank, world_size, device, store, storage_url, *tasks = sys.argv[1:]
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
    for task in tasks:
        job, model, attempt = task.split(":")
        run_attempt(open_storage(storage_url), job, model, int(attempt), group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
