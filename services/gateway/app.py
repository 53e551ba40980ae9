"""What Ray Serve runs: an HTTP gateway, and pools of model hosts behind it, each a Serve deployment.

Nothing here depends on the models: hosts watch the registry, and nothing is redeployed for a new model.

Under `services.gateway.deploy` the gateway and each pool are Serve applications of their own, because Serve restarts
all replicas of an application whose arguments change. `genmodels run` and Kubernetes have all in one application; there
a changed file of the pools starts new processes or a new cluster anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve._private import replica
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from genmodels.engine.history import History
from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.image.requests import ImageRequest
from genmodels.engine.model import Contract
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.completion import Vocabulary
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import GenmodelsError, RequestError
from genmodels.keys import Keys
from genmodels.sizing.memory import MORE_TEXTS, SERVED_ROWS
from genmodels.storage import open_storage
from services.gateway.catalog import CatalogEntry
from services.gateway.deploy import pool_application
from services.gateway.model_host import CompletionStarted, ModelHost
from services.gateway.pool_config import DEFAULT, RESERVED, Pool, Pools, read_pools
from services.gateway.pool_routing import PoolRouting
from services.gateway.router import ModelRouter
from services.gateway.routes import create_app
from services.gateway.watched_catalogue import WatchedCatalogue
from services.http.middleware import LOOPBACK, PROXY_REQUESTS

HEALTH_SECONDS = 2.0
LOCAL = "127.0.0.1"

# Serve's defaults have no limit on waiting requests, and a rollout stops the old replica before the new one runs.
_COMMON: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    "max_surge_percent": 100,
    "graceful_shutdown_wait_loop_s": 0.5,
    "graceful_shutdown_timeout_s": 30,  # requests in progress may take so long when a replica stops
    "logging_config": {"enable_access_log": False},
}


def build(storage_url: str, *, auth: bool, pools: Pools | None = None) -> Application:
    """Build the application, to be run with `serve.run(build(url, auth=True), name="genmodels", route_prefix="/")`.

    Args:
        storage_url: the storage with the registry and the keys; the same for all processes.
        auth: require keys. Without keys, only loopback host names are accepted.
        pools: default: those of `read_pools()`.
    """
    pools = pools or read_pools()
    pooled = {pool.name: pool_hosts(storage_url, pool) for pool in pools.pools}
    return Gateway.options(user_config=pools.model_dump(mode="json")).bind(storage_url, auth, pooled)  # type: ignore[attr-defined]


def application(arguments: dict[str, Any]) -> Application:
    """Build the whole application, called by Serve on the cluster.

    Args:
        arguments: those of `build`. The default of `storage_url` is GENMODELS_STORAGE of the cluster's nodes.

    Raises:
        GenmodelsError: there is neither.
    """
    storage_url = arguments.get("storage_url") or os.environ.get("GENMODELS_STORAGE")
    if not storage_url:
        raise GenmodelsError("GENMODELS_STORAGE is not set on the cluster's nodes, and `storage_url` is not given")
    return build(**{**arguments, "storage_url": storage_url})


def gateway(arguments: dict[str, Any]) -> Application:
    """Build the gateway alone, called by Serve; the pools are applications of their own and come as `user_config`."""
    return Gateway.bind(arguments["storage_url"], arguments["auth"], {})  # type: ignore[attr-defined]


def hosts(arguments: dict[str, Any]) -> Application:
    """Build the hosts of one pool alone, called by Serve."""
    return pool_hosts(arguments["storage_url"], Pool.model_validate(arguments["pool"]))


def pool_hosts(storage_url: str, pool: Pool) -> Application:
    """Build the deployment of the hosts of one pool."""
    deployment = Host.options(**_serve_options(pool))  # type: ignore[attr-defined]
    names = ("memory", "workers", "torch_threads", "device", "dtype", "slots", "pin")
    return deployment.bind(storage_url, pool=pool.name, **{name: getattr(pool, name) for name in names})


def _serve_options(pool: Pool) -> dict[str, Any]:
    """Return Serve's options for the deployment of a pool."""
    at_once = max(pool.slots or SERVED_ROWS, pool.workers)  # requests that a host computes at the same time
    most = max(pool.slots or max(MORE_TEXTS), at_once)  # requests to a small text model
    options: dict[str, Any] = {
        "name": pool.name,
        "ray_actor_options": {"num_cpus": pool.cpus, "num_gpus": pool.gpus},
        "max_ongoing_requests": 2 * most,
        "max_queued_requests": max(4 * most, pool.max_waiting),
        "graceful_shutdown_timeout_s": pool.stop_seconds,
    }
    if pool.replicas_per_node:
        options["max_replicas_per_node"] = pool.replicas_per_node
    if pool.gpus:
        options["max_surge_percent"] = 0  # there may be no second GPU: an old host stops before a new one starts
    if pool.min_replicas == pool.max_replicas:
        return options | {"num_replicas": pool.min_replicas}
    look_back = min(30.0, max(11.0, pool.idle_seconds / 2))  # Serve scales by the mean over so long, more than 10 s
    return options | {
        "autoscaling_config": {
            "min_replicas": pool.min_replicas,
            "max_replicas": pool.max_replicas,
            "target_ongoing_requests": at_once,
            "look_back_period_s": look_back,
            "downscale_to_zero_delay_s": pool.idle_seconds - look_back,
        }
    }


@serve.deployment(
    name=DEFAULT,
    request_router_config=RequestRouterConfig(request_router_class=ModelRouter),  # type: ignore[arg-type]
    **_COMMON,
)
class Host(ModelHost):
    def __init__(self, storage_url: str, **options: Any) -> None:
        _stay_on_this_machine()
        super().__init__(storage_url, **options)


@serve.deployment(name=RESERVED, max_ongoing_requests=PROXY_REQUESTS + 32, max_queued_requests=256, **_COMMON)
@serve.ingress()
class Gateway:
    """Answer HTTP requests with the hosts of all pools.

    Args:
        hosts: the pools in the gateway's own application; others are applications named by `pool_application`.
    """

    def __init__(self, storage_url: str, auth: bool, hosts: dict[str, DeploymentHandle[Any]]) -> None:
        _stay_on_this_machine()
        self.hosts = hosts
        storage = open_storage(storage_url, in_use=True)
        self.catalogue = WatchedCatalogue(storage)
        self.pools = PoolRouting(self.catalogue, self._connect)
        self.keys = Keys(storage) if auth else None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.pools, hosts=None if self.keys else LOOPBACK, keys=self.keys)

    async def reconfigure(self, pools: dict[str, Any]) -> None:
        """Set the pools: Serve calls this at the start and when they change, without a restart."""
        self.pools.configure(Pools.model_validate(pools))

    def _connect(self, pool: str) -> HandlePool:
        handle = self.hosts.get(pool)  # the application of another pool may not exist yet
        return HandlePool(handle or serve.get_deployment_handle(pool, pool_application(pool), _check_exists=False))


class HandlePool:
    """A `Pool` of model hosts behind a Serve handle. Serve cancels a host's work when it is cancelled here."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._checked = -HEALTH_SECONDS
        self._problem: str | None = None

    async def health(self) -> str | None:
        """Return why a host is unhealthy, or None.

        The host is asked at most once in HEALTH_SECONDS, because the route needs no key.
        A host that is busy or gone counts as healthy: requests get an error of their own for that.
        """
        if time.monotonic() - self._checked >= HEALTH_SECONDS:
            self._checked = time.monotonic()
            with contextlib.suppress(RayError, BackPressureError, DeploymentUnavailableError, TimeoutError):
                self._problem = await asyncio.wait_for(self._handle.health.remote(), HEALTH_SECONDS)
        return self._problem

    def is_running(self) -> bool:
        """Return whether a host runs, as Serve's controller has told this process; Serve has no public call for it."""
        router = getattr(self._handle._router, "_asyncio_router", None)
        return bool(router and router.request_router and router.request_router.curr_replicas)

    async def wake(self) -> None:
        """Return when a host answers: Serve starts one for a call that waits.

        Raises:
            RequestError: the hosts cannot be reached.
        """
        if isinstance(answer := await _answer(self._handle, "health"), RequestError):
            raise answer

    async def model(self, name: str) -> CatalogEntry | RequestError:
        return await self._ask_about("model", name)

    async def contract(self, name: str) -> Contract | RequestError:
        return await self._ask_about("contract", name)

    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError:
        return await self._ask_about("answer", name, request)

    async def vocabulary(self, name: str) -> Vocabulary | RequestError:
        return await self._ask_about("vocabulary", name)

    async def history(self, name: str, points: int) -> History | RequestError:
        return await self._ask_about("history", name, points)

    async def sample(self, name: str, step: int, file: str) -> bytes | RequestError:
        return await self._ask_about("sample", name, step, file)

    async def complete(
        self, name: str, request: CompletionRequest
    ) -> AsyncGenerator[CompletionStarted | TextDelta | RequestError, None]:
        try:
            items: Any = _placed(self._stream, name).complete.remote(name, request)
            async for item in items:
                yield item
        except GeneratorExit:  # the client has disconnected between two items; Serve cancels nothing in this case
            items.cancel()
            raise
        except (RayError, BackPressureError, DeploymentUnavailableError) as error:
            yield _request_error(error)

    async def _ask_about(self, method: str, name: str, *arguments: Any) -> Any:
        return await _answer(_placed(self._handle, name), method, name, *arguments)


def _placed(handle: DeploymentHandle[Any], name: str) -> DeploymentHandle[Any]:
    """Return a handle whose calls go to the replica for a model; all versions of a model have the same one."""
    return handle.options(multiplexed_model_id=name.partition("@")[0])


async def _answer(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> Any:
    try:
        return await getattr(handle, method).remote(*arguments)
    except (RayError, BackPressureError, DeploymentUnavailableError) as error:
        return _request_error(error)


def _stay_on_this_machine() -> None:
    """Let the replica in this process listen on 127.0.0.1 if its node does, as under `genmodels up`.

    Serve binds the gRPC server for calls between deployments to all interfaces, and has no option for it. Every call
    needs the cluster's token.
    """
    if get_node_ip_address() == LOCAL:
        replica.add_port_to_grpc_server = _listen_locally  # type: ignore[attr-defined]


def _listen_locally(server: Any, address: str) -> int:
    port: int = add_port_to_grpc_server(server, f"{LOCAL}:{address.rpartition(':')[2]}")
    return port


def _request_error(error: Exception) -> RequestError:
    if isinstance(error, BackPressureError):
        return RequestError(
            "too many requests are waiting; try again in a moment", status=429, code="too_many_requests"
        )
    if isinstance(error, RayTaskError):  # the host's own log has the traceback
        return RequestError("internal error of the model host", status=500, code="internal_error")
    return RequestError("the model host is not available; try again in a moment", status=503, code="host_lost")
