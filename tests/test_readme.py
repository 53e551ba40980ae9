"""The README says what is so: its file tree, its specs, its quick commands, its names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from genmodels import models
from genmodels.data import DATASETS
from genmodels.spec import parse_spec, read_spec
from services.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTED = "<!-- run by tests/test_readme.py -->\n```bash\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_file_tree_is_the_one_there_is() -> None:
    listed = set()
    folders: list[str] = []
    tree = next(block for block in blocks("text") if "pyproject.toml" in block)
    for line in tree.splitlines():
        name = line.strip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 4
        folders[depth:] = [name]
        if not name.endswith("/"):
            listed.add("".join(folders))
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    there = {name for name in tracked if not name.startswith("tests/") and (ROOT / name).exists()}
    assert listed == there


@pytest.mark.parametrize("block", blocks("yaml"))
def test_specs_shown_are_valid(block: str) -> None:
    parse_spec(block.encode(), "README.md", ROOT)


@pytest.mark.parametrize("line", README.partition(TESTED)[2].partition("```")[0].splitlines())
def test_quick_commands_run(line: str, tmp_path: Path) -> None:
    program, *arguments = line.split()
    assert program == "genmodels"
    storage = {"GENMODELS_STORAGE": tmp_path.as_uri()}
    command = [sys.executable, "-m", "services.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **storage})
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def test_every_command_family_dataset_and_spec_is_in_it() -> None:
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert all(f"`genmodels {name}" in README for name in commands)
    assert all(f"| `{name}` |" in README for name in [*models.names(), *DATASETS])
    assert all(f"`{path.name}`" in README for path in (ROOT / "jobs").glob("*.yaml"))


def test_every_setting_of_a_family_is_in_its_row() -> None:
    for name in models.names():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        family = models.load(name)
        assert all(f"`{field}`" in row for field in family.Config.model_fields), name
        assert all(f"`{metric}`" in row for metric in family.metric_names), name
        assert all(f"`{measure}`" in README for measure in family.evaluation_names), name


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_specs_are_valid_and_say_what_they_take(path: Path) -> None:
    read_spec(path)
    assert path.read_text().startswith("# ")


def test_defaults_in_the_table_are_those_of_the_code() -> None:
    for name in models.names():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        for field, info in models.load(name).Config.model_fields.items():
            default = str(info.default).lower() if isinstance(info.default, bool) else str(info.default)
            assert f"`{field}` ({default})" in row


def test_results_trains_and_measures_every_model_that_needs_no_gpu(tmp_path: Path) -> None:
    """`make results`, with a stand-in for genmodels that writes down what it is asked for."""
    program, asked = tmp_path / "bin" / "genmodels", tmp_path / "asked"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    for done in (".ready", ".ready-dev"):
        (tmp_path / done).touch()
    subprocess.run(["make", "results", f"VENV={tmp_path}"], cwd=ROOT, check=True, capture_output=True)
    lines = asked.read_text().splitlines()
    specs = {path.name: read_spec(path).models for path in (ROOT / "jobs").glob("*.yaml")}
    wanted = {name: [model.name for model in found if not model.scaling.use_gpu] for name, found in specs.items()}
    assert {line.split()[1]: re.findall(r"--only (\S+)", line) for line in lines if line.startswith("run ")} == {
        f"jobs/{name}": models for name, models in wanted.items() if models
    }
    measured = [line.split()[1] for line in lines if line.startswith("evaluate ")]
    assert sorted(measured) == sorted(name for names in wanted.values() for name in names)
