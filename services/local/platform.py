"""The whole platform on this machine: Ray, drivers as subprocesses, and the Serve application, all on 127.0.0.1."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from types import TracebackType

from genmodels.errors import Conflict
from genmodels.registry.catalogue_keeper import CatalogueKeeper
from genmodels.registry.references import resolve_datasets, resolve_init_from
from genmodels.runs.gc_marks import mark
from genmodels.runs.job_index import index_job
from genmodels.spec.parse import dump, job_id
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage
from genmodels.storage.documents import now
from services.cluster.environment import private_folder, short_tmpdir
from services.cluster.ports import HOST
from services.cluster.processes import removed_if_killed
from services.cluster.ray_start import local_environment, serve_http_options
from services.dispatch.backends.base import Capacity
from services.dispatch.backends.local_process import SubprocessBackend
from services.gateway.deploy import APPLICATION
from services.gateway.pool_config import RESERVED


class LocalPlatform:
    """A Ray cluster of its own, never one that runs already. As a context manager, it ends all of its processes."""

    def __init__(self, storage: Storage, logs: Path, num_cpus: int) -> None:
        self.storage, self.logs, self.num_cpus = storage, logs, num_cpus
        self.ray_seconds = 0.0
        self._end = contextlib.ExitStack()
        self._serves = False

    def __enter__(self) -> LocalPlatform:
        self._end.enter_context(CatalogueKeeper(self.storage).running())
        return self

    def start(self) -> None:
        """Start Ray. Ray and the drivers work in a folder of their own, so that they import nothing from the user's."""
        began = time.monotonic()
        os.environ |= local_environment()
        os.environ.pop("RAY_ADDRESS", None)
        import ray

        self.folder = self._end.enter_context(private_folder())
        self._end.enter_context(removed_if_killed(self.folder))
        os.environ |= short_tmpdir(self.folder)
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
        """Start gateway and model hosts, with keys if `auth`; return the endpoint's URL once they answer."""
        from ray import serve

        from services.gateway.app import build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options=serve_http_options(HOST, port), logging_config={"log_level": "ERROR"})
        serve.run(build(self.storage.url, auth=auth), name=APPLICATION, route_prefix="/")
        self._serves = True
        return f"http://{HOST}:{port}"


def _end_serving() -> None:
    """End the model hosts, then the gateway: so the gateway can tell clients that their streams are cut."""
    import ray
    from ray import serve

    with contextlib.suppress(Exception):  # a broken Ray ends all its processes at once
        for actor in ray.util.list_named_actors(all_namespaces=True):
            replica, _, name = actor["name"].partition(f"SERVE_REPLICA::{APPLICATION}#")
            if not replica and name and not name.startswith(f"{RESERVED}#"):
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        serve.delete(APPLICATION)


def submit(storage: Storage, spec: JobSpec) -> str:
    """Store a job under the id of its content, and return the id: so the same file continues its earlier runs.

    Raises:
        SpecError: a dataset, or the model that training starts from, is not in the storage.
    """
    spec = resolve_datasets(spec, storage)
    job = job_id(spec)  # before `init_from` is resolved: the run may later move that alias itself
    key = f"jobs/{job}/spec.json"
    if not storage.exists(key):
        data = dump(resolve_init_from(spec, storage))
        index_job(storage, job, spec, now())
        with contextlib.suppress(Conflict):  # another process has stored the same job
            storage.put(key, data, if_absent=True)
    mark(storage, job, [model.name for model in spec.models])  # each time: the same file continues ended runs
    return job
