"""TODO"""

from __future__ import annotations

import os
import secrets

# To be in the environment before Ray starts, wherever a part of Serve may run. Over gRPC, and without a second thread
# in each process, 16 streams get 2.6 times the tokens (`make bench-serving` on 2 cores).
SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "services.gateway.proxy.proxy_middlewares",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


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
