"""Let a model host read the catalogue once, and wait for the loads that follow."""

from __future__ import annotations

import time

from services.gateway.model_host import ModelHost

SECONDS = 60.0


def watch(host: ModelHost) -> None:
    """Read the catalogue, and return when the new versions of the models in memory serve or are refused."""
    host.watch()
    deadline = time.monotonic() + SECONDS
    while host._watcher._swaps or host._pins.loads:
        assert time.monotonic() < deadline
        time.sleep(0.005)
