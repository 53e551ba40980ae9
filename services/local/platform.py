"""The whole platform on this machine: Ray, drivers as subprocesses, and the Serve application, all on 127.0.0.1."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import socket
import time
from pathlib import Path
from types import TracebackType

from genmodels.errors import Conflict, GenmodelsError
from genmodels.registry.pin import pin_datasets, pin_initial
from genmodels.runs.jobs import index_runs
from genmodels.runs.records import now
from genmodels.spec.sections import JobSpec, dump, job_id
from genmodels.storage import Storage
from services.cluster.environment import own_folder
from services.dispatch.backends.base import SubprocessBackend
from services.dispatch.supervisor import Capacity
from services.gateway.deploy import APPLICATION
from services.http.middleware import SERVE_ENVIRONMENT

HOST = "127.0.0.1"
POOL = "default"  # Serve's deployment of model hosts


class LocalPlatform:
    """A Ray of its own, never one that happens to run already. With `with`, all of it is gone at the end."""

    def __init__(self, storage: Storage, logs: Path, num_cpus: int) -> None:
        self.storage, self.logs, self.num_cpus = storage, logs, num_cpus
        self.ray_seconds = 0.0
        self._end = contextlib.ExitStack()
        self._serves = False

    def __enter__(self) -> LocalPlatform:
        return self

    def start(self) -> None:
        """Start Ray. It works in a folder of its own, and so do drivers: none imports what lies in the user's."""
        began = time.monotonic()
        os.environ |= ray_environment()
        os.environ.pop("RAY_ADDRESS", None)
        import ray

        self.folder = self._end.enter_context(own_folder())
        with contextlib.chdir(self.folder):
            ray.init(
                address="local",
                num_cpus=self.num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=HOST,
                _temp_dir=str(self.folder / "ray"),
            )
        self.address = ray.get_runtime_context().gcs_address
        self.ray_seconds = time.monotonic() - began

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        import ray

        try:
            if self._serves:
                _end_serving()
        finally:
            ray.shutdown()  # with Serve and everything else that runs in it
            self._end.close()

    def backend(self) -> SubprocessBackend:
        import ray

        there = ray.cluster_resources()
        capacity = Capacity(int(there.get("CPU", 0)), int(there.get("GPU", 0)))
        return SubprocessBackend(self.logs, {"RAY_ADDRESS": self.address}, capacity, self.folder)

    def serve(self, port: int, *, auth: bool) -> str:
        """Start gateway and model hosts; the endpoint's URL once they answer. With `auth` they ask for keys."""
        from ray import serve

        from services.gateway.app import HTTP_OPTIONS, build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={**HTTP_OPTIONS, "port": port}, logging_config={"log_level": "ERROR"})
        serve.run(build(self.storage.url, auth=auth), name=APPLICATION, route_prefix="/")
        self._serves = True
        return f"http://{HOST}:{port}"


def _end_serving() -> None:
    """End model hosts first and then the gateway: so it can tell clients, in an event, that their stream is cut."""
    import ray
    from ray import serve

    with contextlib.suppress(Exception):  # of a Ray that is broken all ends at once
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["name"].startswith(f"SERVE_REPLICA::{APPLICATION}#{POOL}#"):
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        serve.delete(APPLICATION)


def ray_environment() -> dict[str, str]:
    """What has to be in the environment before Ray is imported, for a Ray that keeps to this machine."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: single-node, so that ports listen on 127.0.0.1 only
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **cluster_environment(),
    }


def cluster_environment() -> dict[str, str]:
    """The part of it that every Ray of ours has, also one of many machines."""
    return {
        # Every process shares one secret; without it whoever reaches a port of Ray's runs code here.
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DistributedDataParallel warns of what is meant: see training/loop.py
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "60"),  # for a driver to save
        **SERVE_ENVIRONMENT,
    }


def submit(storage: Storage, spec: JobSpec) -> str:
    """Store a job under the id of its content, so that the same file goes on where it was; the job's id.

    Raises:
        SpecError: a dataset or what training starts from is not in the storage.
    """
    spec = pin_datasets(spec, storage)
    job = job_id(spec)  # before `init_from` is pinned: a run that moves the alias it began with is the same run
    key = f"jobs/{job}/spec.yaml"
    if not storage.exists(key):
        data = dump(pin_initial(spec, storage))
        index_runs(storage, job, [model.name for model in spec.models], now())
        with contextlib.suppress(Conflict):  # somebody else is as quick
            storage.put(key, data, if_absent=True)
    return job


def check_port(port: int, option: str = "--port") -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise GenmodelsError(f"port {port} of {HOST} is taken; choose another with {option}") from None


def is_free(port: int) -> bool:
    try:
        check_port(port)
    except GenmodelsError:
        return False
    return True


def free_ports(count: int) -> int:
    """The first of some free ports in a row, below those that the system gives to outgoing connections."""
    for _ in range(100):
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind((HOST, port))
            return first
    raise GenmodelsError(f"no {count} free ports in a row between 20000 and 32000")
