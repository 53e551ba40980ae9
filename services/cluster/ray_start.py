"""Start Ray: the flags of `ray start` and the environment of everything that Ray starts."""

from __future__ import annotations

import secrets
from pathlib import Path

from genmodels.sizing.machine import memory_limit
from services.cluster.environment import ray_command
from services.cluster.settings import settings

MEMORY_LABEL = "genmodels/memory"  # of a node: the bytes that its processes may have together

# Must be in the environment before Ray starts, wherever a part of Serve may run. Over gRPC, and without a second thread
# in each process, 16 streams get 2.6 times the tokens (`make bench-serving` on 2 cores).
SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "services.gateway.proxy.proxy_middlewares",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


def serve_http_options(host: str, port: int) -> dict[str, str | int | float]:
    """Return Serve's HTTP options: where its proxy listens, and for how many seconds a request may take."""
    return {"host": host, "port": port, "request_timeout_s": 300.0}


def ray_start_command(node_address: str, *, head: bool, **flags: str | int | Path | None) -> list[str]:
    """Return the `ray start` command that runs one node until it ends.

    Args:
        node_address: the node's own IP address.
        flags: more flags, with `_` for `-`; None: the flag is left out.
    """
    options = {
        "node_ip_address": node_address,
        "min_worker_port": 0,  # any free one
        "max_worker_port": 0,
        "include_log_monitor": "false",  # logs go to storage
        "labels": f"{MEMORY_LABEL}={memory_limit()}",  # a submission is checked with it
        **flags,
    }
    given = (f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None)
    return ray_command("start", *["--head"] * head, "--block", "--disable-usage-stats", *given)


def local_environment() -> dict[str, str]:
    """Return the variables, to be set before Ray is imported, of a Ray that only this machine can reach."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: single-node, so that ports listen on 127.0.0.1 only
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **cluster_environment(),
    }


def cluster_environment() -> dict[str, str]:
    """Return the variables of every Ray that this project starts, on one machine or on many."""
    return {
        # Every process shares one secret. Without it, anyone who reaches one of Ray's ports could run code here.
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run genmodels` makes each worker run uv in a copy of a folder
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else DistributedDataParallel warns of a setting that is intended
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": settings().job_stop_seconds,
        **SERVE_ENVIRONMENT,
    }
