"""Provide a job spec and a way to run a command to the tests of commands."""

from __future__ import annotations

from collections.abc import Callable

SPEC = """\
name: shapes
models:
  - name: vae-digits
    model: {family: vae}
    data: {dataset: digits}
    train: {max_steps: 100}
  - name: gan-digits
    model: {family: gan}
    data: {dataset: digits}
    train: {max_steps: 200}
"""
Command = Callable[..., tuple[int, str, str]]


def submitted(command: Command) -> str:
    code, out, err = command("submit", "shapes.yaml")
    assert code == 0, err
    return out.strip()
