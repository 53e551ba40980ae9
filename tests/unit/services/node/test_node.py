"""Test the node of a container, with Ray and the exporter: a head and a worker on loopback addresses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from genmodels.errors import GenmodelsError
from services.cluster import ray_start
from services.node import node
from tests.support.ray_node import until


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.node", *arguments, "--storage", "file:///nowhere"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), ("short\n", "got a token of 5 characters")])
def test_without_a_token_it_refuses_in_one_line(content: str | None, why: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    done = start("head", "--head", "127.0.0.1", RAY_AUTH_TOKEN_PATH=str(token))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {token}: ")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert "short" not in done.stderr


def test_a_head_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "RESOLVE_SECONDS", 0.0)
    with pytest.raises(GenmodelsError, match=r"the head 'no\.invalid' cannot be found"):
        node.own_address("no.invalid")
    assert node.own_address("127.0.0.1") == "127.0.0.1"


def test_what_ray_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (node, ray_start):
        monkeypatch.setattr(module, "memory_limit", lambda: 6 * 2**30)
    head = node.command("head", "ray-head", "10.0.0.2", 0)
    assert {"--head", "--block", "--num-cpus=0", "--dashboard-host=10.0.0.2", "--node-ip-address=10.0.0.2"} <= set(head)
    assert f"--memory={3 * 2**30}" in head, "four drivers"
    assert f"--labels={ray_start.MEMORY_LABEL}={6 * 2**30}" in head
    worker = node.command("worker", "ray-head", "10.0.0.3", None)
    assert f"--memory={3 * 2**28}" in worker, "one driver: the rest is for training"
    assert "--address=ray-head:6379" in worker
    assert not [word for word in worker if word.startswith(("--head", "--num-cpus", "--dashboard"))]

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    monkeypatch.setenv("GENMODELS_GCS", "/gcs")
    variables = node.environment("head", "http://ray-head:8265")
    assert variables["RAY_AUTH_MODE"] == "token"
    assert (variables["RAY_gcs_storage"], variables["RAY_gcs_storage_path"]) == ("rocksdb", "/gcs")
    assert "RAY_gcs_storage" not in node.environment("worker", "http://ray-head:8265")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    with pytest.raises(GenmodelsError, match="PROMETHEUS_MULTIPROC_DIR is not set"):
        node.environment("worker", "http://ray-head:8265")


@pytest.mark.slow
def test_the_node_ends_with_its_ray_and_leaves_nothing(tmp_path: Path) -> None:
    """Ray is a stand-in that ignores SIGTERM; the real one runs in tests/compose."""
    script = """
import signal, sys, time
from pathlib import Path
from services.node import node
stand_in = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ray', flush=True); "
stand_in += "time.sleep(600)"
node.command = lambda *_: [sys.executable, "-c", stand_in]
node.STOP_SECONDS = 1.0
node.exporter.PORT = 0
sys.argv = ["node", "head", "--head", "127.0.0.1", "--storage", Path(sys.argv[1]).as_uri()]
sys.exit(node.main())
"""
    token = tmp_path / "token"
    token.write_text("t" * 64)
    (tmp_path / "metrics").mkdir()
    environment = {"RAY_AUTH_TOKEN_PATH": str(token), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    for kill, code in ((True, 1), (False, 0)):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "storage")],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            lines = iter(process.stdout.readline, "")
            assert "ray\n" in lines
            stand_in = until(lambda: [pid for pid in pids("time.sleep(600)") if pid != process.pid], "it runs", 20)
            if kill:
                os.kill(stand_in[-1], signal.SIGKILL)
            else:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == code
        assert not pids("time.sleep(600)")


def pids(mark: str) -> list[int]:
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(mark.encode() in word for word in words):
                pids.append(int(folder.name))
    return sorted(pids)
