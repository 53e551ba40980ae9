"""Figures with their bounds, and the requests that a real S3 server gets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.table import Table

from genmodels.storage import Storage, open_storage
from tests.support.s3_server import S3Server

ThingT = TypeVar("ThingT")
SEEDERS = 16  # threads that write what a figure is measured on


@dataclass(frozen=True)
class Row:
    """A figure for `n` things. `bound`: the largest value that is good enough; None: only shown."""

    what: str
    n: int
    value: float
    unit: str
    bound: float | None = None

    @property
    def verdict(self) -> str:
        if self.bound is None:
            return ""
        return "ok" if self.value <= self.bound else "over"


class Requests:
    """Count the requests of a storage, by the name of S3's operation; a list has one for each page."""

    def __init__(self, storage: Storage) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        inner: Any = storage
        inner._storage._client.meta.events.register("before-send.s3.*", self._count)

    def _count(self, event_name: str, **_: Any) -> None:
        with self._lock:
            self.counts[event_name.rpartition(".")[2]] += 1

    @property
    def total(self) -> int:
        return self.counts.total()

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Yield the requests of the body, complete at its end."""
        before, within = self.counts.copy(), Counter[str]()
        yield within
        within.update(self.counts - before)


def opened(server: S3Server, prefix: str) -> tuple[Storage, Requests]:
    """Open an empty storage of its own for a figure."""
    storage = open_storage(f"s3://{server.bucket}/{prefix}")
    return storage, Requests(storage)


def in_parallel(do: Callable[[ThingT], object], things: Iterable[ThingT]) -> None:
    with ThreadPoolExecutor(SEEDERS) as threads:
        list(threads.map(do, things))


def timed(do: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def table(rows: Iterable[Row]) -> Table:
    """Show each figure for all N together."""
    shown = Table("what", "N", "measured", "bound", "")
    for column in (1, 2, 3):
        shown.columns[column].justify = "right"
    rows = list(rows)
    whats = list(dict.fromkeys(row.what for row in rows))
    for row in sorted(rows, key=lambda row: (whats.index(row.what), row.n)):
        bound = "" if row.bound is None else f"{row.bound:g} {row.unit}"
        shown.add_row(row.what, f"{row.n:,}", f"{row.value:,.3g} {row.unit}", bound, row.verdict)
    return shown
