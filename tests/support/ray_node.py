"""Run real Ray nodes as processes that tests kill: a head, and workers that join it under their own addresses."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.cluster.ports import free_ports
from services.cluster.reaper import kill_session
from services.dispatch.backends.ray_jobs import RayJobsBackend

READY_SECONDS = 90.0
HEAD, OTHER = "127.0.0.3", "127.0.0.2"  # Ray would replace 127.0.0.1 by this machine's external address
# Ray listens only on loopback addresses unless a setting says that other nodes may join.
ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "OMP_NUM_THREADS": "1"}


class RayNode:
    """Run `ray start --block` under a reaper, in a new session. Inside `with`; no process stays behind."""

    def __init__(self, log: Path, flags: dict[str, Any]) -> None:
        command = [str(Path(sysconfig.get_path("scripts")) / "ray"), "start", "--block"]
        options = {"min-worker-port": 0, "max-worker-port": 0, "include-log-monitor": "false", **flags}
        command += ["--head"] * ("address" not in flags)
        self.command = [
            sys.executable,
            "-m",
            "services.cluster.reaper",
            *command,
            *(f"--{k}={v}" for k, v in options.items()),
        ]
        self.log = log
        self.start()

    def start(self) -> None:
        """Start the node; after a kill again at the same ports."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill all its processes with SIGKILL, workers included."""
        self.process.kill()
        self.process.wait()
        kill_session(self.process.pid)
        assert self.process.stdin
        self.process.stdin.close()

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.kill()
        elif self.process.stdin:
            self.process.stdin.close()


class RayHead(RayNode):
    """Run the head of a cluster: a loopback address, free ports, the token of this process's environment."""

    def __init__(self, log: Path, num_cpus: int, **more: Any) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
        first = free_ports(4)
        self.gcs, self.dashboard = f"{HEAD}:{first}", f"http://{HEAD}:{first + 3}"
        flags = {
            "port": first,
            "ray-client-server-port": first + 1,
            "dashboard-agent-listen-port": first + 2,
            "dashboard-host": HEAD,
            "dashboard-port": first + 3,
            "num-cpus": num_cpus,
            "temp-dir": self.folder.name,
        }
        super().__init__(log, {"node-ip-address": HEAD, **flags, **more})

    def __enter__(self) -> RayHead:
        self.backend = RayJobsBackend(self.dashboard)
        until(lambda: self.backend.capacity(), "Ray starts", READY_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.folder.cleanup()


class JoinedNode(RayNode):
    """Run another node of a cluster, on this machine under its own address."""

    def __init__(self, log: Path, head: RayHead, num_cpus: int, address: str = OTHER, **more: Any) -> None:
        self.head, self.cpus = head, num_cpus
        flags = {"address": head.gcs, "node-ip-address": address, "num-cpus": num_cpus}
        super().__init__(log, flags | more | {"dashboard-agent-listen-port": free_ports(1)})

    def __enter__(self) -> JoinedNode:
        return self


def until(look: Callable[[], Any], what: str, seconds: float = 150.0, pause: float = 0.1) -> Any:
    """Call `look` until its result is true; return the result."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(pause)
    return value
