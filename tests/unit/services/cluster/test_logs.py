"""Test where the output of child processes is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from genmodels.errors import GenmodelsError
from services.cluster.logs import log_folder

UNWRITABLE = Path("/proc")  # for root too


def test_logs_are_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert log_folder() == Path(".genmodels/logs")
    assert log_folder(Path("mine")) == Path("mine")
    assert {path.name for path in tmp_path.iterdir()} == {".genmodels", "mine"}


def test_logs_are_in_the_cache_if_the_working_directory_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(UNWRITABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert log_folder() == tmp_path / "genmodels" / "logs"
    assert log_folder().is_dir()


def test_without_any_folder_for_logs_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(UNWRITABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(UNWRITABLE / "cache"))
    with pytest.raises(GenmodelsError, match=r"\.genmodels/logs or /proc/cache/genmodels/logs; choose another folder"):
        log_folder()
    with pytest.raises(GenmodelsError, match="no folder for logs can be written: /proc/mine;"):
        log_folder(UNWRITABLE / "mine")
