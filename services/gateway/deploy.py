"""Keep gateway and pools deployed on a Ray cluster, also after a restart of the cluster.

    python -m services.gateway.deploy --storage URL [--host 127.0.0.1] [--port 8000] [--no-auth]

The process declares them over the dashboard's HTTP API. Every second it checks that they exist, and that they are
those of the file of the pools (GENMODELS_POOLS). The gateway and each pool are Serve applications of their own: Serve
restarts the replicas of a changed pool alone, and tells the running gateway the new pools. What has not changed is left
alone, so this process may be restarted while replicas continue to answer.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

from genmodels.errors import SpecError
from services.cluster.dashboard import Dashboard
from services.cluster.logs import log_to_stderr
from services.cluster.ports import HOST
from services.cluster.ray_start import serve_http_options
from services.gateway.pool_config import RESERVED, Pools, WatchedPools

APPLICATION = "genmodels"
CHECK_SECONDS = 1.0  # between two checks
RETRY_SECONDS = 10.0  # after a failed deployment
APPLICATIONS = "/api/serve/applications/"
DEPLOY_SECONDS = 60.0  # timeout, as Serve's controller may have to start

log = logging.getLogger("genmodels.deploy")


def keep_deployed(dashboard: Dashboard, storage_url: str, host: str, port: int, auth: bool) -> None:
    """Check the applications every second, and declare them if one is missing or not as declared; never return."""
    pools = WatchedPools()
    last = ""
    while True:
        declared = declaration(storage_url, host, port, auth, pools.read())
        applications = _applications(dashboard)
        if (status := _status(applications)) != last:
            log.info("Serve's applications: %s", status)
            last = status
        if applications is not None and not _is_deployed(declared, applications):
            answer = dashboard.ask("PUT", APPLICATIONS, declared, DEPLOY_SECONDS)
            log.info("declared: %s", "no answer" if answer is None else f"{answer.status_code} {answer.text}"[:2000])
            if "DEPLOY_FAILED" in status or answer is None or answer.status_code != 200:
                time.sleep(RETRY_SECONDS)
        time.sleep(CHECK_SECONDS)


def declaration(storage_url: str, host: str, port: int, auth: bool, pools: Pools) -> dict[str, Any]:
    """Return the configuration of Serve, in the format of its REST API."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": serve_http_options(host, port),
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "services.gateway.app:gateway",
                "args": {"storage_url": storage_url, "auth": auth},
                "deployments": [{"name": RESERVED, "user_config": pools.model_dump(mode="json")}],
            },
            *(
                {
                    "name": pool_application(pool.name),
                    "route_prefix": None,  # reached through the gateway only
                    "import_path": "services.gateway.app:hosts",
                    "args": {"storage_url": storage_url, "pool": pool.model_dump(mode="json")},
                }
                for pool in pools.pools
            ),
        ],
    }


def pool_application(pool: str) -> str:
    """Return the name of the Serve application of a pool."""
    return f"{APPLICATION}-{pool}"


def _applications(dashboard: Dashboard) -> dict[str, Any] | None:
    """Return Serve's description of each application by name; None if it does not answer."""
    answer = dashboard.ask("GET", APPLICATIONS)
    if answer is None or answer.status_code != 200:
        return None
    return dict(answer.json()["applications"])


def _status(applications: dict[str, Any] | None) -> str:
    """Return Serve's status of each application (RUNNING, DEPLOYING, ...) in words."""
    if applications is None:
        return "unknown"
    return ", ".join(f"{name} {details['status']}" for name, details in sorted(applications.items())) or "none"


def _is_deployed(declared: dict[str, Any], applications: dict[str, Any]) -> bool:
    """Return whether Serve has exactly the declared applications, running or about to run."""
    wanted = {application["name"]: application for application in declared["applications"]}
    surplus = [
        name
        for name, details in applications.items()
        if name.startswith(f"{APPLICATION}-") and name not in wanted and details["status"] != "DELETING"
    ]
    return not surplus and all(
        name in applications
        and applications[name]["status"] != "DEPLOY_FAILED"
        and (applications[name]["status"] == "DELETING" or _has(applications[name]["deployed_app_config"], application))
        for name, application in wanted.items()
    )


def _has(config: Any, declared: Any) -> bool:
    """Return whether a configuration has all that is declared; Serve may add defaults."""
    if isinstance(declared, dict):
        return isinstance(config, dict) and all(_has(config.get(key), value) for key, value in declared.items())
    if isinstance(declared, list):
        return isinstance(config, list) and len(config) == len(declared) and all(map(_has, config, declared))
    return bool(config == declared)


def main() -> None:
    log_to_stderr()
    parser = argparse.ArgumentParser(description="Keep gateway and pools deployed.")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--host", default=HOST, help="address that the endpoint listens on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-auth", action="store_true", help="require no keys; for this machine only")
    options = parser.parse_args()
    if options.no_auth and options.host != HOST:
        parser.error(f"--no-auth is for this machine only: --host must be {HOST}, not {options.host}")
    try:
        keep_deployed(Dashboard(), options.storage, options.host, options.port, not options.no_auth)
    except SpecError as error:  # the file of the pools is damaged
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
