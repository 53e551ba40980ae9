"""`genmodels up`: the whole platform on this machine, each part a child process that is started again when it dies.

    ray        the head of a cluster, in which drivers, workers, gateway and model hosts run
    jobs       the job service: HTTP API, queue, dispatcher
    gateway    keeps gateway and model hosts deployed in Ray
    exporter   /metrics of this node

All listen on 127.0.0.1. None waits for another: each one goes on trying until it finds what it needs, so the order in
which they start or die does not matter. State is in storage alone.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx

from genmodels.metrics import DIRECTORY
from genmodels.storage import Storage, begin_writing
from services.cluster import dashboard
from services.cluster.descriptors import raise_file_limit
from services.cluster.environment import own_folder, python, ray_command
from services.cluster.ports import HOST, check_port, free_ports, is_free
from services.cluster.processes import Child, Tell
from services.cluster.ray_start import ray_environment
from services.dispatch.backends.ray_jobs import RayJobsBackend
from services.dispatch.drain import interruptions, leave
from services.jobs.app import check_access
from services.node import exporter

TICK_SECONDS = 0.2
STOP_SECONDS = 10.0  # for a service to end by itself
READY_SECONDS = 2.0  # for a service to answer
DASHBOARD_PORT = 8265  # where it is free


@dataclass
class Options:
    """What `genmodels up` can be told."""

    port: int = 8000
    api_port: int = 8080
    metrics_port: int = exporter.PORT
    auth: bool = True
    num_cpus: int | None = None
    logs: Path = Path(".genmodels") / "logs"


class RayPorts(NamedTuple):
    """The same ones after each restart, so that nobody has to be told."""

    gcs: int
    client: int
    agent: int
    dashboard: int


def up(storage: Storage, options: Options, tell: Tell | None = None) -> None:
    """Run the platform until SIGINT or SIGTERM; attempts that run then have saved, and go on at the next `up`.

    Raises:
        GenmodelsError: there is no key that anybody could use, a port is taken, or too few files may be open.
    """
    tell = tell or _print
    raise_file_limit()
    check_access(storage, HOST, not options.auth)
    begin_writing(storage)
    for name in ("port", "api_port", "metrics_port"):
        check_port(getattr(options, name), f"--{name.replace('_', '-')}")
    with own_folder() as folder:
        first = free_ports(4)
        ports = RayPorts(first, first + 1, first + 2, DASHBOARD_PORT if is_free(DASHBOARD_PORT) else first + 3)
        os.environ |= _environment(folder, ports)
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
        ray, jobs, gateway, metrics = children = _children(storage, options, folder, ports)
        with interruptions() as interrupted:
            try:
                _tend(children, options, tell, f"Starting. Storage: {storage.url}. Logs: {options.logs}", interrupted)
            finally:
                tell("Stopping: runs save where they are (Ctrl-C again: at once)")
                jobs.stop(0 if interrupted() > 1 else STOP_SECONDS)
                leave(
                    storage, RayJobsBackend(), "genmodels up was stopped", tell, lambda: interrupted() < 2 and ray.runs
                )
                for child in (gateway, metrics, ray):
                    child.stop(0)


def _tend(children: list[Child], options: Options, tell: Tell, greeting: str, interrupted: Callable[[], int]) -> None:
    told = False
    tell(greeting)
    while not interrupted():
        for child in children:
            child.tend(tell)
        if not told and all(child.is_ready for child in children):
            told = True
            for line in _next_steps(options):
                tell(line)
        time.sleep(TICK_SECONDS)


def _children(storage: Storage, options: Options, folder: Path, ports: RayPorts) -> list[Child]:
    with_auth = [] if options.auth else ["--no-auth"]
    backend = RayJobsBackend()
    shared = dict(os.environ)
    metered = shared | {DIRECTORY: str(folder / "metrics")}  # before Ray starts, so that workers inherit it

    def child(name: str, command: list[str], url: str, ready: Callable[[], bool], env: dict[str, str]) -> Child:
        return Child(
            name, command, options.logs / f"{name}.log", ready, url, env, folder, folder if name == "ray" else None
        )

    def service(name: str, module: str, port: int, path: str, env: dict[str, str], *arguments: str) -> Child:
        url = f"http://{HOST}:{port}"
        command = python(module, *arguments, "--port", str(port))
        return child(name, command, url + path.removesuffix("/healthz"), lambda: _answers(url + path), env)

    def ray_answers() -> bool:
        return backend.capacity() is not None

    at = ["--storage", storage.url, *with_auth]
    return [
        child("ray", _ray_command(options, folder, ports), shared[dashboard.ADDRESS], ray_answers, metered),
        service(
            "jobs", "jobs", options.api_port, "/healthz", shared, *at, "--endpoint", f"http://{HOST}:{options.port}"
        ),
        service("gateway", "gateway.deploy", options.port, "/healthz", shared, *at),
        service("exporter", "node.exporter", options.metrics_port, "/metrics", metered),
    ]


def _ray_command(options: Options, folder: Path, ports: RayPorts) -> list[str]:
    flags = {
        "node-ip-address": HOST,
        "port": ports.gcs,
        "ray-client-server-port": ports.client,
        "dashboard-agent-listen-port": ports.agent,
        "dashboard-host": HOST,
        "dashboard-port": ports.dashboard,
        "min-worker-port": 0,  # any free one
        "max-worker-port": 0,
        "num-cpus": options.num_cpus or os.cpu_count() or 1,
        "temp-dir": folder / "ray",
        "include-log-monitor": "false",  # logs go to storage
    }
    return ray_command("start", "--head", "--block", *(f"--{name}={value}" for name, value in flags.items()))


def _environment(folder: Path, ports: RayPorts) -> dict[str, str]:
    """For all children. The cluster's secret is in a file that only this user reads."""
    (folder / "metrics").mkdir()
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
        file.write(secrets.token_hex(32))
    environment = ray_environment() | {
        "RAY_AUTH_TOKEN_PATH": str(token),
        dashboard.ADDRESS: f"http://{HOST}:{ports.dashboard}",
    }
    del environment["RAY_AUTH_TOKEN"]
    return environment


def _next_steps(options: Options) -> Iterator[str]:
    yield "Everything is up. From another terminal:"
    if options.auth:
        yield "  export GENMODELS_KEY=gm_...   # `genmodels keys create NAME` makes one"
    if options.api_port != 8080:
        yield f"  export GENMODELS_API=http://{HOST}:{options.api_port}"
    if options.port != 8000:
        yield f"  export OPENAI_BASE_URL=http://{HOST}:{options.port}/v1   # for OpenAI's clients"
    yield "  genmodels submit jobs/quickstart.yaml --wait"
    yield f"  RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={os.environ['RAY_AUTH_TOKEN_PATH']} ray status"
    yield "Ctrl-C ends all of it; what trains then goes on at the next `genmodels up`."


def _print(line: str) -> None:
    print(line, flush=True)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=READY_SECONDS, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
