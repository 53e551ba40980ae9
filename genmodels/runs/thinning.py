"""Thin long series in little memory: keep some items, evenly spaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

EVALUATION = b'"val_'  # in a row of metrics that comes from an evaluation


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def thinned_rows(lines: Iterable[bytes], most: int) -> list[bytes]:
    """Return at most `most` (10 or more) lines of metrics in their order; about four times as many are in memory.

    Rows of evaluations are rare, so they are kept before rows of training.
    """
    evaluations, others = _Spread(most), _Spread(most)
    for number, line in enumerate(lines):
        (evaluations if EVALUATION in line else others).add((number, line))
    rows = others.items()
    kept = thinned(evaluations.items(), max(most // 2, most - len(rows)))
    return [line for _, line in sorted([*kept, *thinned(rows, most - len(kept))])]


class _Spread:
    """Keep each n-th item of a stream of unknown length; n doubles when more than twice `most` items are kept."""

    def __init__(self, most: int) -> None:
        self._most, self._every, self._seen = most, 1, 0
        self._kept: list[tuple[int, bytes]] = []
        self._last: tuple[int, bytes] | None = None

    def add(self, item: tuple[int, bytes]) -> None:
        self._last = item
        if self._seen % self._every == 0:
            self._kept.append(item)
        self._seen += 1
        if len(self._kept) > 2 * self._most:
            self._kept = self._kept[::2]
            self._every *= 2

    def items(self) -> list[tuple[int, bytes]]:
        """Return evenly spaced items, with the first and the last."""
        return self._kept if self._last is None or self._kept[-1] == self._last else [*self._kept, self._last]
