"""What a container of a cluster runs: one Ray node, and beside it the exporter of its metrics.

    python -m services.node head|worker --head NAME --storage URL [--num-cpus N]

It ends when Ray does, so that whoever runs the container starts it again, empty. On SIGTERM the attempts that would be
lost save and leave first: all of them on the head, where drivers run; on a worker those that train there.
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
from genmodels.storage import open_storage
from services.cluster import dashboard
from services.cluster.dashboard import Dashboard
from services.cluster.descriptors import raise_file_limit
from services.cluster.environment import python, ray_command, settle
from services.cluster.processes import Child
from services.cluster.ray_start import cluster_environment
from services.dispatch.backends.ray_jobs import RayJobsBackend
from services.dispatch.drain import interruptions, leave
from services.node import exporter

GCS_PORT, DASHBOARD_PORT, RAY_METRICS_PORT = 6379, 8265, 9401
OBJECT_STORE = 256 * 2**20  # bytes: no data set and no weights travel through Ray's object store
TOKEN, GCS_FOLDER = "RAY_AUTH_TOKEN_PATH", "GENMODELS_GCS"
FIND_SECONDS = 120.0  # for the head's name to resolve; then it is for the restart policy to try again
TICK_SECONDS = 0.2
STOP_SECONDS = 10.0
TRAINING = "RayTrainWorker"  # the class of the actors in which Ray Train's workers run


def run(role: str, head: str, storage_url: str, num_cpus: int | None) -> int:
    """Run the node until SIGTERM (0) or until Ray ends (1).

    Args:
        head: the head's name in the network that Ray is to use.
        num_cpus: for training workers; default: as many as Ray finds.
    """
    check_token()
    address = own_address(head)
    os.environ |= environment(role, f"http://{head}:{DASHBOARD_PORT}")
    ray = Child("ray", command(role, head, address, num_cpus), None, lambda: True, address, os.environ)
    serve = python("node.exporter", "--host", "0.0.0.0")
    metrics = Child("exporter", serve, None, lambda: True, f"port {exporter.PORT}", os.environ)
    with interruptions() as interrupted:
        try:
            metrics.tend(tell)
            ray.tend(tell)
            while ray.runs and not interrupted():
                metrics.tend(tell)
                time.sleep(TICK_SECONDS)
            if not interrupted():
                tell("Ray has ended, and so does this node")
                return 1
            tell("stopping: attempts save where they are (a second signal: at once)")
            only = None if role == "head" else _withdraw(head, address)
            may_wait = _patience(interrupted, ray)
            leave(open_storage(storage_url), RayJobsBackend(), f"its {role} was stopped", tell, may_wait, only)
            return 0
        finally:
            ray.stop(STOP_SECONDS)
            metrics.stop(0)


def check_token() -> None:
    """Raises GenmodelsError: the cluster's secret is not there; without it Ray would run anybody's code."""
    path = Path(os.environ.get(TOKEN) or "/run/secrets/ray_token")
    try:
        found = path.read_text().strip()
    except OSError as error:
        raise GenmodelsError(f"{path}: no token of the cluster ({error.strerror}); `make secrets` makes one") from None
    if len(found) < 32:
        raise GenmodelsError(f"{path}: got a token of {len(found)} characters, expected 32 or more; see `make secrets`")


def own_address(head: str) -> str:
    """This node's address in the network that it shares with the head."""
    deadline = time.monotonic() + FIND_SECONDS
    while True:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((head, GCS_PORT))  # sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise GenmodelsError(f"the head {head!r} cannot be found: {error}") from None
            time.sleep(TICK_SECONDS)


def environment(role: str, dashboard_url: str) -> dict[str, str]:
    """What Ray and all that it starts have in common."""
    if DIRECTORY not in os.environ:  # Ray's workers inherit it
        raise GenmodelsError(f"{DIRECTORY} is not set; it has to name a folder, best one in memory")
    state = os.environ.get(GCS_FOLDER)  # so that a head that was started again knows its cluster
    kept = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": state} if role == "head" and state else {}
    return {**cluster_environment(), dashboard.ADDRESS: dashboard_url, **kept}


def command(role: str, head: str, address: str, num_cpus: int | None) -> list[str]:
    flags = {
        "node-ip-address": address,
        "object-store-memory": OBJECT_STORE,
        "metrics-export-port": RAY_METRICS_PORT,
        "min-worker-port": 0,  # any free one
        "max-worker-port": 0,
        "include-log-monitor": "false",  # logs go to storage
        "disable-usage-stats": None,
        "block": None,
    }
    if num_cpus is not None:
        flags["num-cpus"] = num_cpus
    if role == "head":
        at = {"dashboard-host": address, "dashboard-port": DASHBOARD_PORT}
        flags |= {"head": None, "port": GCS_PORT, **at}
    else:
        flags["address"] = f"{head}:{GCS_PORT}"
    return ray_command(
        "start", *(f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items())
    )


def tell(line: str) -> None:
    print(line, flush=True)


def _withdraw(head: str, address: str) -> list[str]:
    """Have Ray start nothing more on this node; the runs (job/model) that train on it."""
    ray = Dashboard()
    nodes = _listed(ray, "/api/v0/nodes?detail=1&limit=10000&timeout=4")
    here = [node["node_id"] for node in nodes if node["node_ip"] == address and node["state"] == "ALIVE"]
    if not here:
        return []
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the worker was stopped"]
    to = ["--address", f"{head}:{GCS_PORT}", "--node-id", here[0], "--deadline-remaining-seconds", "600"]
    subprocess.run(ray_command("drain-node", *to, *why), check=False, timeout=60)
    actors = _listed(ray, "/api/v0/actors?detail=1&limit=10000&timeout=4")
    drivers = {a["job_id"] for a in actors if a["node_id"] == here[0] and TRAINING in a["class_name"]}
    jobs = ray.ask("GET", "/api/jobs/")
    found = jobs.json() if jobs is not None and jobs.status_code == 200 else []
    return [f"{job['metadata']['job']}/{job['metadata']['model']}" for job in found if job["job_id"] in drivers]


def _listed(ray: Dashboard, path: str) -> list[dict[str, str]]:
    answer = ray.ask("GET", path)
    if answer is None or answer.status_code != 200:
        return []
    found: list[dict[str, str]] = answer.json()["data"]["result"]["result"]
    return found


def _patience(interrupted: Callable[[], int], ray: Child) -> Callable[[], bool]:
    return lambda: interrupted() < 2 and ray.runs


def main() -> int:
    parser = argparse.ArgumentParser(description="Run one node of a Ray cluster, and the exporter of its metrics.")
    parser.add_argument("role", choices=["head", "worker"])
    parser.add_argument("--head", required=True, help="the head's name in the network that Ray is to use")
    parser.add_argument("--storage", required=True, help="s3://bucket/prefix, where runs hear commands")
    parser.add_argument("--num-cpus", type=int, help="for training workers; default: all")
    options = parser.parse_args()
    settle()
    try:
        raise_file_limit()
        return run(options.role, options.head, options.storage, options.num_cpus)
    except GenmodelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
