"""Keep the rows of a series in few objects while it grows: metrics and logs.

    <folder>/00000000-00000010.jsonl        the rows of positions above 0, up to 10

Positions only rise: they are steps, or bytes. One process alone writes into a folder. Each of its writes makes a part,
an object that never changes. Ten parts of one level become one part of the next level: the longer part is stored first,
then the ten are deleted. So a series of N writes has about 10 log10(N) objects, and each row is stored log10(N) times.

The writer may end between any two of these operations, and a late put may store a part that was deleted. So a reader
takes the longest parts, and leaves out each part that a longer one covers: no row is lost, and none comes twice.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, takewhile

from genmodels.errors import KeyNotFound
from genmodels.storage import Storage
from genmodels.storage.documents import CHUNK_BYTES

PART = r"\d{8,}(-\d{8,})?\.jsonl"
MERGED = 10  # parts that become one
MAX_MERGED_BYTES = CHUNK_BYTES  # larger parts stay as they are: their writer must not hold more in memory
LISTINGS = 3  # until no part is missing


@dataclass(frozen=True)
class Part:
    """An object with the rows of a series whose positions are above `after`, up to `last`."""

    key: str
    after: int
    last: float  # infinite: not known
    size: int  # in bytes

    def has(self, other: Part) -> bool:
        """Return whether this longer part was merged from another one."""
        return self.key != other.key and self.after <= other.after and self.last >= other.last


class PartWriter:
    """Write a series into a folder that no other process writes into. Not thread-safe."""

    def __init__(self, storage: Storage, folder: str, start: int = 0) -> None:
        """Args:
        start: no row has this position or a lower one.
        """
        self._storage, self._folder, self._last = storage, folder, start
        self._open: list[_Written] = []  # parts that may still be merged, the oldest first
        self._covered: deque[str] = deque()  # keys of parts that a longer one covers

    def write(self, last: int, data: bytes) -> None:
        """Store rows as one part.

        Args:
            last: position of the last row.

        Raises:
            StorageUnavailable: the part may be stored or not; call again with the same arguments.
        """
        part = _Written(self._last, last, 0, data)
        self._put(part)
        self._last = last
        self._open.append(part)
        self._close_long()

    def merge(self) -> None:
        """Merge parts, and delete the parts that are covered. After StorageUnavailable, the next call does the rest."""
        while parts := self._mergeable():
            data = b"".join(part.data for part in parts)
            longer = _Written(parts[0].after, parts[-1].last, parts[0].level + 1, data)
            self._put(longer)
            place = self._open.index(parts[0])
            self._open[place : place + MERGED] = [longer]
            self._close_long()
            self._covered += [self._key(part) for part in parts]
        while self._covered:
            self._storage.delete(self._covered[0])
            self._covered.popleft()

    def _put(self, part: _Written) -> None:
        self._storage.put(self._key(part), part.data)

    def _mergeable(self) -> list[_Written]:
        """Return the ten oldest of the newest parts that have one level, or nothing."""
        same = list(takewhile(lambda part: part.level == self._open[-1].level, reversed(self._open)))
        return same[::-1][:MERGED] if len(same) >= MERGED else []

    def _close_long(self) -> None:
        """Drop each part that is too long to be merged, and those before it: only neighbours are merged."""
        while any(len(part.data) >= MAX_MERGED_BYTES for part in self._open):
            del self._open[0]

    def _key(self, part: _Written) -> str:
        return f"{self._folder}{part.after:08d}-{part.last:08d}.jsonl"


@dataclass(frozen=True)
class _Written:
    after: int
    last: int
    level: int
    data: bytes


def list_parts(storage: Storage, prefix: str, start: int = 0) -> dict[str, list[Part]]:
    """Return the parts of each series below a prefix, by its folder: those that have each row once, in order.

    A listing that a merge overlaps may show neither the ten parts nor the longer one, so it is repeated.

    Args:
        start: no row of these series has this position or a lower one.
    """
    series: dict[str, list[Part]] = {}
    for _ in range(LISTINGS):
        series = {folder: _longest(parts) for folder, parts in _by_folder(storage.sizes(prefix)).items()}
        if all(_has_no_gap(parts, start) for parts in series.values()):
            break
    return series


def merged(gone: Part, parts: list[Part]) -> list[Part]:
    """Return the parts to read on with, from the one that a deleted part was merged into.

    Raises:
        KeyNotFound: it was not merged; so the series was deleted.
    """
    following = [part for part in parts if part.last > gone.after]
    if following and following[0].has(gone):
        return following
    raise KeyNotFound(f"{gone.key}: no such object")


def _by_folder(sizes: Mapping[str, int]) -> dict[str, list[Part]]:
    series: dict[str, list[Part]] = {}
    singles: dict[str, list[tuple[int, str]]] = {}
    for key, size in sizes.items():
        folder, _, name = key.rpartition("/")
        if match := re.fullmatch(r"(\d{8,})-(\d{8,})\.jsonl", name):
            series.setdefault(f"{folder}/", []).append(Part(key, int(match[1]), int(match[2]), size))
        elif match := re.fullmatch(r"(\d{8})\.jsonl", name):
            singles.setdefault(f"{folder}/", []).append((int(match[1]), key))
    for folder, named in singles.items():
        series[folder] = series.get(folder, []) + _by_first(sorted(named), sizes)
    return series


def _by_first(named: list[tuple[int, str]], sizes: Mapping[str, int]) -> list[Part]:
    """Return parts that an earlier release wrote: each is named by its first row, and none is ever merged."""
    ends = [*(first - 1 for first, _ in named[1:]), math.inf]
    return [Part(key, first - 1, end, sizes[key]) for (first, key), end in zip(named, ends, strict=True)]


def _longest(parts: Iterable[Part]) -> list[Part]:
    """Return the parts that no other part covers, in order."""
    longest: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.after, -part.last)):
        if not longest or part.last > longest[-1].last:
            longest.append(part)
    return longest


def _has_no_gap(parts: list[Part], start: int) -> bool:
    if not parts or parts[-1].last == math.inf:  # of an earlier release
        return True
    return parts[0].after <= start and all(later.after <= earlier.last for earlier, later in pairwise(parts))
