"""Test what `make test-cluster` does where it must not touch a cluster; on a cluster it is its own test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.manifests import kubectl
from tests.support.paths import ROOT

# Real kustomize; every other command is recorded, and the namespace exists.
FAKE = """\
#!/bin/sh
case "$1" in
    kustomize) exec {kubectl} "$@" ;;
esac
echo "$@" >> {log}
[ "$1" = get ] && echo namespace/genmodels
exit 0
"""


def prove(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("KUBECONFIG", "SECRETS")}
    command = [sys.executable, "-m", "tests.cluster.prove"]
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


def test_without_a_cluster_it_is_skipped_aloud() -> None:
    done = prove()
    assert done.returncode == 0
    assert done.stdout.startswith("skipped: KUBECONFIG is not set")


def test_a_namespace_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(FAKE.format(kubectl=kubectl(), log=tmp_path / "log"))
    (tmp_path / "kubectl").chmod(0o755)
    done = prove(KUBECONFIG="any", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 1
    assert "the namespace genmodels exists" in done.stdout
    assert (tmp_path / "log").read_text().split("\n") == ["get namespace genmodels --ignore-not-found -o name", ""]
