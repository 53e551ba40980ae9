"""Keeps the Serve application deployed on a Ray cluster, also on one that was started again and has forgotten it.

    python -m services.gateway.deploy --storage URL [--host 127.0.0.1] [--port 8000] [--no-auth]

It declares the application over the dashboard's HTTP API and looks again and again whether it is there. What runs
already is left as it is, so this process may come and go while replicas go on answering.
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
LOOK_SECONDS = 1.0
RETRY_SECONDS = 10.0  # after a deployment that failed
APPLICATIONS = "/api/serve/applications/"
DEPLOY_SECONDS = 60.0  # for Serve's controller to start

log = logging.getLogger("genmodels.deploy")


def keep_deployed(dashboard: Dashboard, storage_url: str, host: str, port: int, auth: bool) -> None:
    """Never returns."""
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
        time.sleep(LOOK_SECONDS)


def declaration(storage_url: str, host: str, port: int, auth: bool) -> dict[str, Any]:
    """What Serve is to run, as its REST API takes it."""
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
    """Serve's word for it (RUNNING, DEPLOYING, ...), ABSENT, or UNKNOWN."""
    answer = dashboard.ask("GET", APPLICATIONS)
    if answer is None or answer.status_code != 200:
        return "UNKNOWN"
    found = answer.json()["applications"].get(APPLICATION)
    return str(found["status"]) if found else "ABSENT"


def main() -> None:
    log_to_stderr()
    parser = argparse.ArgumentParser(description="Keep the Serve application deployed.")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--host", default=HOST, help="address that the endpoint listens on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-auth", action="store_true", help="ask for no key; for this machine alone")
    options = parser.parse_args()
    if options.no_auth and options.host != HOST:
        parser.error(f"--no-auth is for this machine alone: --host must be {HOST}, not {options.host}")
    keep_deployed(Dashboard(), options.storage, options.host, options.port, not options.no_auth)


if __name__ == "__main__":
    main()
