"""Make backends start another command than the driver, and wait for its end."""

from __future__ import annotations

import pytest

from services.dispatch.backends import local_process, ray_jobs
from services.dispatch.backends.base import Driver
from tests.support.ray_node import until


def end_of(driver: Driver, seconds: float = 60.0) -> int:
    until(lambda: driver.poll() is not None, "the driver ends", seconds)
    code = driver.poll()
    assert code is not None
    return code


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Make drivers run this command instead."""
    monkeypatch.setattr(local_process, "turns_command", lambda *_: list(words))
    monkeypatch.setattr(ray_jobs, "driver_command", lambda *_: list(words))
