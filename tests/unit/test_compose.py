"""Test what is known of compose.yaml without a container engine: versions that read it, and limits that fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from genmodels.data import images, text
from genmodels.sizing.memory import HOST_MEMORY
from tests.support.paths import ROOT

GIB = 2**30
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def run_secrets(tmp_path: Path, docker: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of docker/secrets.sh, with a shell script as docker."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "docker" / "secrets.sh", tmp_path / "docker")
    (tmp_path / "bin" / "docker").write_text(f"#!/bin/sh\n{docker}\n")
    (tmp_path / "bin" / "docker").chmod(0o755)
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(tmp_path / "docker" / "secrets.sh")]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("version", "reads"),
    [
        ("2.9.0", False),
        ("v2.16.0", False),
        ("2.17.0", True),
        ("2.24.7-desktop.1", True),
        ("2.30.0", False),
        ("v2.30.1", False),
        ("2.30.3", True),
        ("5.6.1", True),
    ],
)
def test_make_secrets_warns_of_a_compose_that_cannot_read_the_file(tmp_path: Path, version: str, reads: bool) -> None:
    done = run_secrets(tmp_path, f"echo {version}")
    assert done.returncode == 0
    assert (done.stderr == "") is reads
    assert (tmp_path / ".secrets" / "ray_token").exists()


def test_make_secrets_needs_no_docker(tmp_path: Path) -> None:
    done = run_secrets(tmp_path, "echo 'compose is not a docker command' >&2; exit 1")
    assert (done.returncode, done.stderr) == (0, "")


def test_make_secrets_adds_a_line_of_its_own_to_the_settings(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GENMODELS_VERSION=7")  # an editor left its end out
    run_secrets(tmp_path, "exit 1")
    assert (tmp_path / ".env").read_text().splitlines() == ["GENMODELS_VERSION=7", "GENMODELS_SECRETS=./.secrets"]


def test_every_service_has_limits_that_fit_what_it_holds() -> None:
    limits = {name: bytes_of(service["mem_limit"]) for name, service in SERVICES.items()}
    for node in ("head", "worker", "gpu-worker"):  # Ray and a driver or training, next to a full model host
        assert limits[node] >= HOST_MEMORY + 3 * GIB
    assert limits["jobs"] >= max(images.MAX_BYTES + GIB, 5 * text.MAX_BYTES + GIB // 2)
    in_memory = {name: sum(bytes_of(size) for size in tmpfs_sizes(service)) for name, service in SERVICES.items()}
    assert {name for name in in_memory if in_memory[name] > limits[name]} == set()


def test_the_page_names_the_limits() -> None:
    page = (ROOT / "docs" / "compose.md").read_text()
    for name, service in SERVICES.items():
        shown = re.search(rf"^\| [^|]*`{name.removeprefix('gpu-')}`[^|]*\| ([^|]+) \|", page, re.MULTILINE)
        assert shown, name
        size = bytes_of(service["mem_limit"])
        assert f"{size // GIB} GiB" == shown[1] or f"{size // 2**20}" in shown[1], name


def tmpfs_sizes(service: dict[str, Any]) -> list[str]:
    return [option for mount in service.get("tmpfs", ()) for option in re.findall(r"size=([^,]+)", mount)]


def bytes_of(written: str) -> int:
    """Return the number of a size, or of the default of a variable."""
    match = re.fullmatch(r"(?:\$\{\w+:-)?(\d+)([gm])b?\}?", written)
    assert match, written
    return int(match[1]) * (GIB if match[2] == "g" else 2**20)
