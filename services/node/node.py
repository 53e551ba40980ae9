"""The main process of a cluster's container: it runs one Ray node, and the exporter of the node's metrics.

    python -m services.node head|worker --head NAME --storage URL [--num-cpus N]

It ends when Ray ends, so that the container is restarted, empty. On SIGTERM it first lets those attempts save and
stop that would be lost: on the head, where drivers run, all attempts; on a worker, the attempts that train there.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from genmodels.errors import GenmodelsError
from genmodels.metrics import DIRECTORY
from genmodels.sizing.machine import memory_limit
from genmodels.storage import open_storage
from services.cluster import dashboard
from services.cluster.dashboard import Dashboard
from services.cluster.descriptors import raise_file_limit
from services.cluster.environment import isolate_process, python, ray_command
from services.cluster.processes import ManagedProcess
from services.cluster.ray_start import cluster_environment, ray_start_command
from services.cluster.settings import settings
from services.cluster.signals import count_signals
from services.dispatch.backends.ray_jobs import RayJobsBackend
from services.dispatch.drain import drain
from services.node import exporter

GCS_PORT, DASHBOARD_PORT, RAY_METRICS_PORT = 6379, 8265, 9401
OBJECT_STORE_BYTES = 256 * 2**20  # small: neither datasets nor weights pass through Ray's object store
RESOLVE_SECONDS = 120.0  # for the head's name to resolve; after that the container ends and is restarted
POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
# Of a node's memory, what drivers may take. The rest of the head is for Ray and perhaps a model host, the rest of a
# worker for training.
DRIVERS_SHARE = {"head": 0.5, "worker": 0.125}
TRAIN_WORKER = "RayTrainWorker"  # class of the actors in which Ray Train's workers run


def run(role: str, head: str, storage_url: str, num_cpus: int | None) -> int:
    """Run the node; return the exit code: 0 after SIGTERM, 1 after Ray has ended.

    Args:
        head: the head's name in the network that Ray is to use.
        num_cpus: for training workers; default: as many as Ray finds.
    """
    check_token()
    address = own_address(head)
    os.environ |= environment(role, f"http://{head}:{DASHBOARD_PORT}")
    ray = ManagedProcess("ray", command(role, head, address, num_cpus), None, lambda: True, address, os.environ)
    serve = python("node.exporter", "--host", "0.0.0.0")
    metrics = ManagedProcess("exporter", serve, None, lambda: True, f"port {exporter.PORT}", os.environ)
    with count_signals() as signals:
        try:
            metrics.poll(print_line)
            ray.poll(print_line)
            while ray.is_running and not signals():
                metrics.poll(print_line)
                time.sleep(POLL_SECONDS)
            if not signals():
                print_line("Ray has ended, so this node ends too")
                return 1
            print_line("stopping: attempts save their state (a second signal: stop at once)")
            only = None if role == "head" else _cordon(head, address)
            may_wait = _may_wait(signals, ray)
            drain(open_storage(storage_url), RayJobsBackend(), f"its {role} was stopped", print_line, may_wait, only)
            return 0
        finally:
            ray.stop(STOP_SECONDS)
            metrics.stop(0)


def check_token() -> None:
    """Raise GenmodelsError if the cluster has no secret; without a secret Ray would run anyone's code."""
    path = Path(settings().ray_token_path)
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise GenmodelsError(
            f"{path}: the cluster's token cannot be read ({error.strerror}); `make secrets` creates one"
        ) from None
    if len(token) < 32:
        raise GenmodelsError(f"{path}: got a token of {len(token)} characters, expected 32 or more; see `make secrets`")


def own_address(head: str) -> str:
    """Return this node's IP address in the network that it shares with the head.

    Raises:
        GenmodelsError: the head's name does not resolve within RESOLVE_SECONDS.
    """
    deadline = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((head, GCS_PORT))  # sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise GenmodelsError(f"the head {head!r} cannot be found: {error}") from None
            time.sleep(POLL_SECONDS)


def environment(role: str, dashboard_url: str) -> dict[str, str]:
    """Return the variables of Ray and of every process that it starts."""
    if DIRECTORY not in os.environ:  # Ray's workers inherit it
        raise GenmodelsError(f"{DIRECTORY} is not set; set it to a folder, preferably in memory")
    folder = settings().gcs_folder
    state = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": folder} if role == "head" and folder else {}
    return {**cluster_environment(), dashboard.ADDRESS: dashboard_url, **state}


def command(role: str, head: str, address: str, num_cpus: int | None) -> list[str]:
    flags: dict[str, int | str | None] = {
        "object_store_memory": OBJECT_STORE_BYTES,
        "memory": int(memory_limit() * DRIVERS_SHARE[role]),
        "metrics_export_port": RAY_METRICS_PORT,
        "num_cpus": num_cpus,
    }
    if role == "head":
        flags |= {"port": GCS_PORT, "dashboard_host": address, "dashboard_port": DASHBOARD_PORT}
        return ray_start_command(address, head=True, **flags)
    return ray_start_command(address, head=False, address=f"{head}:{GCS_PORT}", **flags)


def print_line(line: str) -> None:
    print(line, flush=True)


def _cordon(head: str, address: str) -> list[str]:
    """Have Ray start nothing more on this node, and return the runs (job/model) that train or have a driver on it."""
    ray = Dashboard()
    nodes = _listed(ray, "/api/v0/nodes?detail=1&limit=10000&timeout=4")
    here = [node["node_id"] for node in nodes if node["node_ip"] == address and node["state"] == "ALIVE"]
    if not here:
        return []
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the worker was stopped"]
    to = ["--address", f"{head}:{GCS_PORT}", "--node-id", here[0], "--deadline-remaining-seconds", "600"]
    subprocess.run(ray_command("drain-node", *to, *why), check=False, timeout=60)
    actors = _listed(ray, "/api/v0/actors?detail=1&limit=10000&timeout=4")
    drivers = {a["job_id"] for a in actors if a["node_id"] == here[0] and TRAIN_WORKER in a["class_name"]}
    jobs = ray.ask("GET", "/api/jobs/")
    submissions = jobs.json() if jobs is not None and jobs.status_code == 200 else []
    here_too = (job for job in submissions if job["job_id"] in drivers or job.get("driver_node_id") == here[0])
    return [f"{job['metadata']['job']}/{job['metadata']['model']}" for job in here_too if job.get("metadata")]


def _listed(ray: Dashboard, path: str) -> list[dict[str, str]]:
    answer = ray.ask("GET", path)
    if answer is None or answer.status_code != 200:
        return []
    items: list[dict[str, str]] = answer.json()["data"]["result"]["result"]
    return items


def _may_wait(signals: Callable[[], int], ray: ManagedProcess) -> Callable[[], bool]:
    return lambda: signals() < 2 and ray.is_running


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one node of a Ray cluster, and the exporter of its metrics.")
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument("--head", required=True, help="the head's name in the network that Ray is to use")
    parser.add_argument("--storage", required=True, help="s3://bucket/prefix, where runs read their commands")
    parser.add_argument("--num-cpus", type=int, help="for training workers; default: all")
    options = parser.parse_args()
    isolate_process()
    try:
        raise_file_limit()
        return run(options.role, options.head, options.storage, options.num_cpus)
    except GenmodelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
