"""Requests to the dashboard of a Ray cluster. Its HTTP API is all that a process outside the cluster needs."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import httpx

ADDRESS = "RAY_API_SERVER_ADDRESS"  # the environment variable that Ray's own clients read, too
ANSWER_SECONDS = 5.0
SILENCE_SECONDS = 2.0  # after a request without an answer; until then further requests fail at once


class Dashboard:
    """A client with short timeouts; a dashboard that hangs costs one timeout, not one for each caller.

    Args:
        address: e.g. http://127.0.0.1:8265; default: the value of RAY_API_SERVER_ADDRESS, else that address.
    """

    def __init__(self, address: str | None = None) -> None:
        address = address or os.environ.get(ADDRESS) or "http://127.0.0.1:8265"
        headers = {"Authorization": f"Bearer {token}"} if (token := _token()) else {}
        # No proxy and no netrc of the environment: the token is for this address alone. A new connection for each
        # request: a kept one may have been closed by the head meanwhile.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=address, headers=headers, trust_env=False, limits=limits)
        self._silent_until = 0.0
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else each request leaves a line in the log

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> httpx.Response | None:
        """Return the answer; None if none came within `seconds`, by default ANSWER_SECONDS."""
        if time.monotonic() < self._silent_until:
            return None
        try:
            return self.client.request(method, path, json=body, timeout=seconds or ANSWER_SECONDS)
        except httpx.HTTPError:
            self._silent_until = time.monotonic() + SILENCE_SECONDS
            return None


def _token() -> str | None:
    """Return the secret of this process's cluster, looked up as Ray itself does."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text().strip()
