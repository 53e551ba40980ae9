"""The job service: the HTTP API that accepts jobs, and the dispatcher that runs them, in one process.

    python -m services.jobs --storage URL

All its state is in storage, so it may be killed and restarted at any moment. Several services may run at once: all of
them answer requests, and only the dispatcher that holds the lease starts runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from genmodels.errors import GenmodelsError
from genmodels.keys import Keys
from genmodels.spec.json_schema import json_schema
from genmodels.storage import Storage, begin_writing, open_storage
from services.cluster.descriptors import raise_file_limit
from services.cluster.logs import log_to_stderr
from services.dispatch.backends.base import Backend, Capacity
from services.dispatch.backends.rayjob import KubeOptions, add_kube_arguments
from services.http.app import new_app, rebased
from services.http.auth import KeyAuth, require_keys
from services.http.connections import Connection
from services.http.middleware import LOOPBACK
from services.http.rate_limits import Slots
from services.jobs.metrics import JobMetrics
from services.jobs.model_routes import UPLOADS, add_model_routes
from services.jobs.routes import add_job_routes

PORT = 8080
BACKENDS = ("ray-jobs", "kuberay")
MAX_BODY = 64 * 1024  # bytes; a spec is the largest body except datasets
MAX_REQUESTS = 384  # at the same time; more get status 503
MAX_REQUESTS_OF_ONE = 128  # at the same time with one key; more get status 429
GRACE_SECONDS = 5  # for open requests to end when the service stops
STOP_SECONDS = 20.0  # for the dispatcher to release its lease

_ABOUT = """\
Submit jobs, watch them, and manage the models that they publish. A job is one YAML file that names models to train; \
each model is a run of its own.

Send the header `Authorization: Bearer gm_...`; `genmodels keys create` creates a key on a machine that can open the \
storage. Errors have the form {"error": {"message", "type", "param", "code"}}.
"""

logger = logging.getLogger("genmodels.jobs")


def create_app(
    storage: Storage,
    *,
    keys: Keys | None,
    hosts: Collection[str] | None,
    closing: Callable[[], bool] = lambda: False,
    stalled: Callable[[], str | None] = lambda: None,
    endpoint: str | None = None,
) -> FastAPI:
    """Build the HTTP application. It only reads and writes storage, and never contacts the cluster.

    Args:
        keys: the valid keys; None: no key is required.
        hosts: allowed values of the Host header; None: any, which is safe only with keys.
        closing: return whether the service is about to end; followed logs end then.
        stalled: return why the dispatcher of this process makes no progress; None: it does.
        endpoint: URL of the gateway, shown with each job.
    """

    async def health() -> str | None:
        return stalled()

    app = new_app(
        "genmodels jobs",
        _ABOUT,
        hosts=hosts,
        schemas=_spec_schemas,
        max_body=MAX_BODY,
        streamed=UPLOADS,
        max_requests=MAX_REQUESTS,
        health=health,
    )
    guard = KeyAuth(keys, slots=Slots("requests", None, MAX_REQUESTS_OF_ONE))
    views = add_job_routes(app, guard, storage, closing, endpoint)
    add_model_routes(app, guard, storage)
    metrics = JobMetrics(views)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def read_service_metrics() -> Response:
        """Read the metrics for Prometheus."""
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return RedirectResponse("/docs")

    return app


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then release the lease; the runs continue."""
    options = _parser().parse_args(arguments)
    log_to_stderr()
    try:
        return _serve(options)
    except GenmodelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check_access(storage: Storage, host: str, no_auth: bool) -> Keys | None:
    """Return the keys that requests must have; None for a service without keys.

    Raises:
        GenmodelsError: no key exists, or the service would be open to other machines without keys.
    """
    if no_auth:
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise GenmodelsError(f"--no-auth is for this machine alone: --host must be 127.0.0.1, not {host}")
        return None
    return require_keys(storage)


def _serve(options: argparse.Namespace) -> int:
    from genmodels.storage.lease import Lease
    from services.dispatch.dispatcher import Dispatcher

    raise_file_limit()
    storage = open_storage(options.storage)
    keys = check_access(storage, options.host, options.no_auth)
    begin_writing(storage)
    dispatcher = Dispatcher(storage, _backend(options, storage), lease=Lease(storage))
    app = create_app(
        storage,
        keys=keys,
        hosts=None if keys else LOOPBACK,
        closing=lambda: server.should_exit,
        stalled=dispatcher.stalled,
        endpoint=options.endpoint or None,
    )
    app.openapi()  # imports the families now, so that no request waits for it
    server = uvicorn.Server(_uvicorn(app, options.host, options.port))
    stop, broken = threading.Event(), threading.Event()

    def dispatch() -> None:
        try:
            dispatcher.run(stop)
        except BaseException as error:  # a service that dispatches nothing must not look healthy
            logger.error("the dispatcher broke: %s: %s", type(error).__name__, error)
            broken.set()
            server.should_exit = True

    thread = threading.Thread(target=dispatch, name="dispatcher", daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn handles them, and raises them again when it has ended
    thread.start()
    try:
        server.run()
    finally:
        stop.set()
        thread.join(STOP_SECONDS)
    return 1 if broken.is_set() or not server.started else 0


def _backend(options: argparse.Namespace, storage: Storage) -> Backend:
    from services.dispatch.backends.kuberay import KubeRayBackend
    from services.dispatch.backends.ray_jobs import RayJobsBackend

    match options.backend:
        case "ray-jobs":
            return RayJobsBackend(options.ray_address, options.max_cpus, options.max_gpus)
        case "kuberay":
            return KubeRayBackend(storage, KubeOptions.of(options), Capacity(options.max_cpus, options.max_gpus))
    raise GenmodelsError(f"GENMODELS_BACKEND must be {' or '.join(BACKENDS)}, not {options.backend!r}")


def _uvicorn(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        http=Connection,
        timeout_graceful_shutdown=GRACE_SECONDS,
        lifespan="off",
        ws="none",
    )


def _spec_schemas() -> dict[str, Any]:
    """Return the job spec's JSON Schema in OpenAPI's form."""
    schema = rebased(json_schema())
    schema.pop("$schema", None)
    return {**schema.pop("$defs", {}), "JobSpec": schema}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("genmodels-jobs", description="The job service: HTTP API and dispatcher.")
    parser.add_argument("--storage", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument(
        "--endpoint",
        default=os.environ.get("GENMODELS_GATEWAY"),
        help="URL of the gateway, which job views show to clients (GENMODELS_GATEWAY)",
    )
    parser.add_argument("--no-auth", action="store_true", help="require no key; serve only this machine")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("GENMODELS_BACKEND") or BACKENDS[0],
        help="ray-jobs: drivers are Ray Jobs of one cluster; kuberay: RayJobs on Kubernetes (GENMODELS_BACKEND)",
    )
    parser.add_argument(
        "--ray-address", help="address of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, or this machine"
    )
    for name in ("cpus", "gpus"):
        help = f"{name.upper()[:-1]}s that the cluster may grow to; default: its present size, on Kubernetes no limit"
        parser.add_argument(f"--max-{name}", type=int, default=0, help=help)
    add_kube_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
