"""Measure the operations of a storage, and decide which refusals are outages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from genmodels.errors import Conflict, KeyNotFound, StorageError, StorageUnavailable
from genmodels.metrics import STORAGE_BYTES, STORAGE_ERRORS, STORAGE_SECONDS
from genmodels.storage.base import PartialUpload, Refused, Storage

WRITES = ("put", "delete", "upload")


class MeasuredStorage(Storage):
    """Forward all operations to a storage; time them and count failures.

    A refusal (`Refused`) is final until an operation of the same kind, reading or writing, has succeeded here: the
    credentials, the bucket or the rights are wrong, and the user is told at once. Later refusals are outages.

    Args:
        in_use: other processes have read and written this storage before, so each refusal is an outage.
    """

    def __init__(self, storage: Storage, in_use: bool = False) -> None:
        self.url, self._storage = storage.url, storage
        self._allowed = {"read": in_use, "write": in_use}

    def get(self, key: str) -> tuple[bytes, str]:
        with self._operation("get"):
            data, etag = self._storage.get(key)
        STORAGE_BYTES.labels("get").inc(len(data))
        return data, etag

    def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        with self._operation("get"):
            answer = self._storage.get_if_changed(key, etag)
        STORAGE_BYTES.labels("get").inc(len(answer[0]) if answer else 0)
        return answer

    def get_range(self, key: str, start: int, size: int) -> bytes:
        with self._operation("get"):
            data = self._storage.get_range(key, start, size)
        STORAGE_BYTES.labels("get").inc(len(data))
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self._operation("put"):
            etag = self._storage.put(key, data, if_absent=if_absent, if_match=if_match)
        STORAGE_BYTES.labels("put").inc(len(data))
        return etag

    def folders(self, prefix: str) -> list[str]:
        with self._operation("list"):
            return self._storage.folders(prefix)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with self._operation("list"):
            return self._storage.list(prefix, after=after, limit=limit)

    def sizes(self, prefix: str) -> dict[str, int]:
        with self._operation("list"):
            return self._storage.sizes(prefix)

    def delete(self, key: str) -> None:
        with self._operation("delete"):
            self._storage.delete(key)

    def exists(self, key: str) -> bool:
        with self._operation("exists"):
            return self._storage.exists(key)

    def upload(self, path: Path, key: str) -> None:
        with self._operation("upload"):
            self._storage.upload(path, key)
        STORAGE_BYTES.labels("upload").inc(path.stat().st_size)

    def upload_memory(self, key: str, data: memoryview) -> None:
        with self._operation("upload"):
            self._storage.upload_memory(key, data)
        STORAGE_BYTES.labels("upload").inc(len(data))

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        with self._operation("get"):
            count = self._storage.read_into(key, start, target)
        STORAGE_BYTES.labels("get").inc(count)
        return count

    def download(self, key: str, path: Path) -> None:
        with self._operation("download"):
            self._storage.download(key, path)
        STORAGE_BYTES.labels("download").inc(path.stat().st_size)

    def partial_uploads(self, seconds: float) -> Sequence[PartialUpload]:
        with self._operation("list"):
            return self._storage.partial_uploads(seconds)

    def abort_upload(self, upload: PartialUpload) -> None:
        with self._operation("delete"):
            self._storage.abort_upload(upload)

    @contextmanager
    def _operation(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with self._outages("write" if name in WRITES else "read"):
                yield
        except (KeyNotFound, Conflict):
            raise
        except StorageError as error:
            kind = StorageUnavailable if isinstance(error, StorageUnavailable) else StorageError
            STORAGE_ERRORS.labels(name, kind.__name__).inc()
            raise
        finally:
            STORAGE_SECONDS.labels(name).observe(time.perf_counter() - began)

    def clock(self) -> float | None:
        return self._storage.clock()

    @contextmanager
    def _outages(self, access: str) -> Iterator[None]:
        try:
            yield
        except (KeyNotFound, Conflict):  # these are answers too
            self._allowed[access] = True
            raise
        except Refused as error:
            if not self._allowed[access]:
                raise
            raise StorageUnavailable(str(error), error.reason) from error
        self._allowed[access] = True
