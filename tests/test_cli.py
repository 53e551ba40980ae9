"""The commands that need no Ray, as a person types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from published import publish
from tiny import make_data, model

from genmodels import models
from genmodels.registry import Registry
from genmodels.storage import open_storage


def genmodels(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_smoke_goes_the_whole_way_for_every_family(tmp_path: Path) -> None:
    make_data(tmp_path)
    entries = [model(tmp_path, family) for family in models.names()]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "test", "models": entries}))
    done = genmodels(tmp_path, "validate", "job.yaml", "--smoke")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "ok: job.yaml: job test, 4 models (autoencoder, gan, minigpt, vae)"
    for family, line in zip(models.names(), lines, strict=True):
        made = "continued " if models.load(family).kind == "text" else "made a PNG of 16x16, "
        assert line.startswith(f"{family}: ok: {made}")
    assert not done.stderr
    assert not (tmp_path / ".genmodels").exists()


def test_smoke_says_what_does_not_fit(tmp_path: Path) -> None:
    make_data(tmp_path)
    entry = model(tmp_path, "vae") | {"data": {"path": str(tmp_path / "play.txt")}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"name": "test", "models": [entry]}))
    done = genmodels(tmp_path, "validate", "job.yaml", "--smoke")
    assert done.returncode == 2
    assert done.stderr == "error: data: vae learns from images, this dataset has texts\n"


def test_models_and_promote(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / ".genmodels").as_uri())
    publish(storage, "shapes", "vae")
    listed = genmodels(tmp_path, "models")
    assert listed.returncode == 0, listed.stderr
    assert "shapes" in listed.stdout
    moved = genmodels(tmp_path, "promote", "shapes@1", "staging")
    assert moved.stdout == "shapes@staging is version 1 now\n"
    assert Registry(storage).resolve("shapes@staging").version == 1


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["promote", "nothing@1"], 1, "error: no model 'nothing'; there are: none yet\n"),
        (["models", "--storage", "ftp://x"], 1, "error: storage URL 'ftp://x': must be file:///"),
        (["run", "nowhere.yaml"], 2, "error: nowhere.yaml: no such file; write the path of a job spec"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], code: int, error: str) -> None:
    done = genmodels(tmp_path, *arguments)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1
    assert not done.stdout
