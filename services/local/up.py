"""`genmodels up`: the whole platform on this machine. Each part is a child process that is restarted when it ends.

    ray        the head of a cluster, in which drivers, workers, gateway and model hosts run
    jobs       the job service: HTTP API, queue, dispatcher
    gateway    keeps gateway and model hosts deployed in Ray
    exporter   /metrics of this node

All listen on 127.0.0.1. Each part retries until it finds the parts that it needs, so the order in which they start or
end does not matter. State is in the storage alone.
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

from genmodels.errors import GenmodelsError
from genmodels.metrics import DIRECTORY
from genmodels.storage import Storage, begin_writing
from services.cluster import dashboard
from services.cluster.descriptors import raise_file_limit
from services.cluster.environment import private_folder, python, short_tmpdir
from services.cluster.logs import log_folder
from services.cluster.ports import HOST, check_port, free_ports, is_free
from services.cluster.processes import ManagedProcess, PrintLine
from services.cluster.ray_start import local_environment, ray_start_command
from services.cluster.signals import count_signals
from services.dispatch.backends.base import DRIVER_MEMORY
from services.dispatch.backends.ray_jobs import RayJobsBackend
from services.dispatch.drain import drain
from services.gateway.pool_config import read_pools
from services.jobs.app import check_access
from services.local.devices import check_pools
from services.node import exporter

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0  # that a service has to end after SIGTERM
READY_SECONDS = 2.0  # that a service has to answer a readiness check
DASHBOARD_PORT = 8265  # if it is free


@dataclass
class Options:
    """Options of `genmodels up`."""

    port: int = 8000
    api_port: int = 8080
    metrics_port: int = exporter.PORT
    auth: bool = True
    num_cpus: int | None = None
    logs: Path | None = None


class RayPorts(NamedTuple):
    """Ray's ports, the same after each restart, so that other processes keep their addresses."""

    gcs: int
    client: int
    agent: int
    dashboard: int


def up(storage: Storage, options: Options, print_line: PrintLine | None = None) -> None:
    """Run the platform until SIGINT or SIGTERM. Running attempts save first, and continue at the next `up`.

    Raises:
        GenmodelsError: the file of the pools is damaged or asks for GPUs that are not here, there is no valid key, a
            port is taken, or the limit of open files is too low.
    """
    print_line = print_line or _print
    raise_file_limit()
    check_pools(read_pools())
    check_access(storage, HOST, not options.auth)
    begin_writing(storage)
    _check_ports({"--port": options.port, "--api-port": options.api_port, "--metrics-port": options.metrics_port})
    logs = log_folder(options.logs)
    with private_folder() as folder:
        first = free_ports(4)
        ports = RayPorts(first, first + 1, first + 2, DASHBOARD_PORT if is_free(DASHBOARD_PORT) else first + 3)
        os.environ |= _environment(folder, ports)
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            os.environ.pop(name, None)
        ray, jobs, gateway, metrics = processes = _processes(storage, options, folder, ports, logs)
        with count_signals() as signals:
            try:
                print_line(f"Starting. Storage: {storage.url}. Logs: {logs}")
                _keep_running(processes, options, print_line, signals)
            finally:
                print_line("Stopping: runs save their state (Ctrl-C again: stop at once)")
                jobs.stop(0 if signals() > 1 else STOP_SECONDS)
                drain(
                    storage,
                    RayJobsBackend(),
                    "genmodels up was stopped",
                    print_line,
                    lambda: signals() < 2 and ray.is_running,
                )
                for process in (gateway, metrics, ray):
                    process.stop(0)


def _check_ports(ports: dict[str, int]) -> None:
    """Raise GenmodelsError if two options name the same port, or if another process listens on one."""
    for option, port in ports.items():
        if (other := next(name for name in ports if ports[name] == port)) != option:
            raise GenmodelsError(f"{other} and {option} are both {port}; choose different ports")
        check_port(port, option)


def _keep_running(
    processes: list[ManagedProcess], options: Options, print_line: PrintLine, signals: Callable[[], int]
) -> None:
    """Keep all processes running until a signal comes; print the next steps once, when all are ready."""
    was_ready = False
    while not signals():
        for process in processes:
            process.poll(print_line)
        if not was_ready and all(process.is_ready for process in processes):
            was_ready = True
            for line in _next_steps(options):
                print_line(line)
        time.sleep(POLL_SECONDS)


def _processes(storage: Storage, options: Options, folder: Path, ports: RayPorts, logs: Path) -> list[ManagedProcess]:
    with_auth = [] if options.auth else ["--no-auth"]
    backend = RayJobsBackend()
    plain = dict(os.environ)
    with_metrics = plain | {DIRECTORY: str(folder / "metrics")}  # before Ray starts, so that workers inherit it

    def process(
        name: str, command: list[str], url: str, ready: Callable[[], bool], env: dict[str, str]
    ) -> ManagedProcess:
        return ManagedProcess(
            name, command, logs / f"{name}.log", ready, url, env, folder, folder if name == "ray" else None
        )

    def service(name: str, module: str, port: int, path: str, env: dict[str, str], *arguments: str) -> ManagedProcess:
        url = f"http://{HOST}:{port}"
        command = python(module, *arguments, "--port", str(port))
        return process(name, command, url + path.removesuffix("/healthz"), lambda: _answers(url + path), env)

    def ray_answers() -> bool:
        return backend.capacity() is not None

    at = ["--storage", storage.url, *with_auth]
    return [
        process("ray", _ray_command(options, folder, ports), plain[dashboard.ADDRESS], ray_answers, with_metrics),
        service(
            "jobs", "jobs", options.api_port, "/healthz", plain, *at, "--endpoint", f"http://{HOST}:{options.port}"
        ),
        service("gateway", "gateway.deploy", options.port, "/healthz", plain, *at),
        service("exporter", "node.exporter", options.metrics_port, "/metrics", with_metrics),
    ]


def _ray_command(options: Options, folder: Path, ports: RayPorts) -> list[str]:
    num_cpus = options.num_cpus or os.cpu_count() or 1
    return ray_start_command(
        HOST,
        head=True,
        port=ports.gcs,
        ray_client_server_port=ports.client,
        dashboard_agent_listen_port=ports.agent,
        dashboard_host=HOST,
        dashboard_port=ports.dashboard,
        num_cpus=num_cpus,
        memory=num_cpus * DRIVER_MEMORY,  # of Ray's tasks only drivers ask for memory, and each run has a worker
        temp_dir=folder / "ray",
    )


def _environment(folder: Path, ports: RayPorts) -> dict[str, str]:
    """Return variables for all processes. The cluster's secret is in a file that only this user can read."""
    (folder / "metrics").mkdir()
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
        file.write(secrets.token_hex(32))
    environment = local_environment() | short_tmpdir(folder)
    environment |= {"RAY_AUTH_TOKEN_PATH": str(token), dashboard.ADDRESS: f"http://{HOST}:{ports.dashboard}"}
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
    yield "Ctrl-C stops everything; running trainings continue at the next `genmodels up`."


def _print(line: str) -> None:
    print(line, flush=True)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=READY_SECONDS, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
