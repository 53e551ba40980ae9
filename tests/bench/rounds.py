"""Measure several ways in turn within each round, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

KeyT = TypeVar("KeyT")


def machine() -> str:
    """Return the processor, its cores, and the load of the last minute: other work changes every figure."""
    return f"{_processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}"


def interleaved(
    ways: Mapping[KeyT, Callable[[], float]], rounds: int, on_measured: Callable[[], object] = lambda: None
) -> dict[KeyT, list[float]]:
    """Return the figures of each way, one of each round. A round before them warms up and does not count."""
    figures: dict[KeyT, list[float]] = {key: [] for key in ways}
    for round in range(rounds + 1):
        for key, measure in ways.items():
            figure = measure()
            if round:
                figures[key].append(figure)
            on_measured()
    return figures


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the median of the rounds' ratios, with the smallest and the largest of them."""
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
