"""Define the fixtures of the commands' tests: the command line in this process, a storage, and its job service."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from genmodels.storage import Storage, open_storage
from services.cli import main, wait
from services.client import http
from services.client import jobs as client_module
from services.http.middleware import LOOPBACK
from services.jobs.app import create_app
from tests.support.asgi_server import served
from tests.support.cli_service import SPEC, Command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run the command line in a folder of its own, without a terminal: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wait, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(http, "FIRST_PATIENCE_SECONDS", 0.2)
    for name in [name for name in os.environ if name.startswith("GENMODELS_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["genmodels", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """Return the storage of the service; commands without options open another folder."""
    return open_storage((tmp_path / "of-the-service").as_uri())


@pytest.fixture
def api(store: Storage, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Start a job service without keys; GENMODELS_API names it."""
    with served(create_app(store, keys=None, hosts=LOOPBACK)) as url:
        monkeypatch.setenv("GENMODELS_API", url)
        (tmp_path / "shapes.yaml").write_text(SPEC)
        yield url
