"""Provide a storage in memory that counts its operations, to test what a service costs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from tests.support.storages import Wrapped


class CountingStorage(Wrapped):
    """Count operations by verb and kind of object, and the most at once; a test may hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.listed = 0  # keys
        self.held, self.at_once, self.most = threading.Event(), 0, 0
        self.slow = 0.0
        self.held.set()
        self._mutex = threading.Lock()

    def _do(self, verb: str, key: str, *arguments: Any, **options: Any) -> Any:
        with self._mutex:
            self.counts[f"{verb} {key.partition('/')[0]}"] += 1
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            assert self.held.wait(30)
            time.sleep(self.slow)
            return super()._do(verb, key, *arguments, **options)
        finally:
            with self._mutex:
                self.at_once -= 1

    def get_range(self, key: str, start: int, size: int) -> bytes:
        return self._do("get_range", key, start, size)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        keys = super().list(prefix, after=after, limit=limit)
        self.listed += len(keys)
        return keys

    def forget(self) -> None:
        self.counts.clear()
        self.most = self.listed = 0
