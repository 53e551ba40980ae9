"""Any storage, with its operations timed and its failures counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genmodels.errors import Conflict, KeyNotFound, StorageError, StorageUnavailable
from genmodels.metrics import STORAGE_ERRORS, STORAGE_SECONDS
from genmodels.storage.base import Storage


class MeasuredStorage(Storage):
    """Passes everything on; what a storage asks of itself on the way is part of the one operation."""

    def __init__(self, storage: Storage) -> None:
        self.url, self._storage = storage.url, storage

    def get(self, key: str) -> tuple[bytes, str]:
        with _measured("get"):
            return self._storage.get(key)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with _measured("put"):
            return self._storage.put(key, data, if_absent=if_absent, if_match=if_match)

    def folders(self, prefix: str) -> list[str]:
        with _measured("list"):
            return self._storage.folders(prefix)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with _measured("list"):
            return self._storage.list(prefix, after=after, limit=limit)

    def sizes(self, prefix: str) -> dict[str, int]:
        with _measured("list"):
            return self._storage.sizes(prefix)

    def delete(self, key: str) -> None:
        with _measured("delete"):
            self._storage.delete(key)

    def exists(self, key: str) -> bool:
        with _measured("exists"):
            return self._storage.exists(key)

    def upload(self, path: Path, key: str) -> None:
        with _measured("upload"):
            self._storage.upload(path, key)

    def download(self, key: str, path: Path) -> None:
        with _measured("download"):
            self._storage.download(key, path)

    def clock(self) -> float | None:
        return self._storage.clock()


@contextmanager
def _measured(operation: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    except (KeyNotFound, Conflict):
        raise
    except StorageError as error:
        kind = StorageUnavailable if isinstance(error, StorageUnavailable) else StorageError
        STORAGE_ERRORS.labels(operation, kind.__name__).inc()
        raise
    finally:
        STORAGE_SECONDS.labels(operation).observe(time.perf_counter() - began)
