"""Test the folders of the code, where import-linter does not check them, and that commit hooks run what CI runs."""

from __future__ import annotations

import re

import yaml

from tests.support.paths import ROOT


def test_few_modules_lie_directly_in_the_library() -> None:
    loose = {path.name for path in (ROOT / "genmodels").glob("*.py")} - {"__init__.py"}
    assert len(loose) <= 6, f"{sorted(loose)}: move one into a room"


def test_no_module_lies_directly_in_services() -> None:
    assert [path.name for path in (ROOT / "services").glob("*.py")] == ["__init__.py"]


def test_every_room_is_a_package() -> None:
    """A folder without __init__.py is left out of the wheel and not seen by import-linter."""
    folders = {path.parent for package in ("genmodels", "services") for path in (ROOT / package).rglob("*.py")}
    assert not [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()]


def test_the_hooks_before_a_commit_are_the_steps_of_make_lint() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert lint
    steps = [line.replace("$(BIN)", ".venv/bin").removesuffix(" .").strip() for line in lint[1].splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == steps
