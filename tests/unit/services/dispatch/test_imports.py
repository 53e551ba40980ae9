"""Test that the dispatcher starts fast and needs little memory: it imports neither torch nor Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "kubernetes", "fastapi")


@pytest.mark.parametrize(
    "module",
    [
        "services.dispatch.dispatcher",
        "services.dispatch.drain",
        "services.dispatch.backends.kuberay",
        "services.dispatch.backends.local_process",
        "services.dispatch.backends.ray_jobs",
        "services.client.jobs",
        "services.train.pre_stop",
    ],
)
def test_the_dispatcher_imports_no_heavy_package(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
