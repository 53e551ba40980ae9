"""Keep the Serve application deployed on a Ray cluster, also after a restart of the cluster.

    python -m services.gateway.deploy --storage URL [--host 127.0.0.1] [--port 8000] [--no-auth]

The process declares the application over the dashboard's HTTP API and checks every second that it exists. A running
application is not changed, so this process may be restarted while replicas continue to answer.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

from services.cluster.dashboard import Dashboard
from services.cluster.logs import log_to_stderr
from services.cluster.ports import HOST
from services.cluster.ray_start import serve_http_options

APPLICATION = "genmodels"
POOL = "default"  # Serve's deployment of model hosts
CHECK_SECONDS = 1.0  # between two checks
RETRY_SECONDS = 10.0  # after a failed deployment
APPLICATIONS = "/api/serve/applications/"
DEPLOY_SECONDS = 60.0  # timeout, as Serve's controller may have to start

log = logging.getLogger("genmodels.deploy")


def keep_deployed(dashboard: Dashboard, storage_url: str, host: str, port: int, auth: bool) -> None:
    """Check the application every second and deploy it if it is missing; never return."""
    last = ""
    while True:
        status = _status(dashboard)
        if status != last:
            log.info("the application is %s", status)
            last = status
        if status in ("ABSENT", "DEPLOY_FAILED"):
            answer = dashboard.ask("PUT", APPLICATIONS, declaration(storage_url, host, port, auth), DEPLOY_SECONDS)
            log.info("declared: %s", "no answer" if answer is None else f"{answer.status_code} {answer.text}"[:2000])
            if status == "DEPLOY_FAILED" or answer is None or answer.status_code != 200:
                time.sleep(RETRY_SECONDS)
        time.sleep(CHECK_SECONDS)


def declaration(storage_url: str, host: str, port: int, auth: bool) -> dict[str, Any]:
    """Return the configuration of Serve, in the format of its REST API."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": serve_http_options(host, port),
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "services.gateway.app:application",
                "args": {"storage_url": storage_url, "auth": auth},
            }
        ],
    }


def _status(dashboard: Dashboard) -> str:
    """Return Serve's status of the application (RUNNING, DEPLOYING, ...), ABSENT, or UNKNOWN."""
    answer = dashboard.ask("GET", APPLICATIONS)
    if answer is None or answer.status_code != 200:
        return "UNKNOWN"
    application = answer.json()["applications"].get(APPLICATION)
    return str(application["status"]) if application else "ABSENT"


def main() -> None:
    log_to_stderr()
    parser = argparse.ArgumentParser(description="Keep the Serve application deployed.")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--host", default=HOST, help="address that the endpoint listens on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-auth", action="store_true", help="require no keys; for this machine only")
    options = parser.parse_args()
    if options.no_auth and options.host != HOST:
        parser.error(f"--no-auth is for this machine only: --host must be {HOST}, not {options.host}")
    keep_deployed(Dashboard(), options.storage, options.host, options.port, not options.no_auth)


if __name__ == "__main__":
    main()
