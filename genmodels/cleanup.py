"""PLACEHOLDER until clean-up is written."""

from __future__ import annotations

from typing import Any


def delete_version(registry: Any, model: str, number: int) -> None:
    raise NotImplementedError


def gc(storage: Any) -> Any:
    raise NotImplementedError
