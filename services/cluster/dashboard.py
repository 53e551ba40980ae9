"""Requests to the dashboard of a Ray cluster, whose HTTP API is all that a process outside the cluster needs of it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import httpx

ADDRESS = "RAY_API_SERVER_ADDRESS"  # the environment variable that Ray's own clients read, too
ANSWER_SECONDS = 5.0
SILENCE_SECONDS = 2.0  # after a request that was not answered, before the next one is tried


class Dashboard:
    """A client with short timeouts; a dashboard that hangs costs one of them, not one for each caller.

    Args:
        address: e.g. http://127.0.0.1:8265; default: what RAY_API_SERVER_ADDRESS says, else that.
    """

    def __init__(self, address: str | None = None) -> None:
        address = address or os.environ.get(ADDRESS) or "http://127.0.0.1:8265"
        headers = {"Authorization": f"Bearer {token}"} if (token := _token()) else {}
        # No proxy and no netrc of the environment: the token is for this address alone. A connection for each request:
        # none is left that a head has closed meanwhile.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=address, headers=headers, trust_env=False, limits=limits)
        self._silent_until = 0.0
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else each look leaves a line in the log

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> httpx.Response | None:
        """The answer, or None if none came within ANSWER_SECONDS or the given time."""
        if time.monotonic() < self._silent_until:
            return None
        try:
            return self.client.request(method, path, json=body, timeout=seconds or ANSWER_SECONDS)
        except httpx.HTTPError:
            self._silent_until = time.monotonic() + SILENCE_SECONDS
            return None


def _token() -> str | None:
    """The secret of this process's cluster, found as Ray itself finds it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text().strip()
