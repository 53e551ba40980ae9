"""Provide storages that tests inspect or make fail, checkpoints to write there, and work in many threads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, Lineage, Manifest
from genmodels.errors import Conflict, KeyNotFound, StorageUnavailable
from genmodels.runs.store import Run
from genmodels.storage import Storage

LINEAGE = Lineage(spec_digest="5", data_digest="d", code_version="c", world_size=1, parent=None)


class MemoryStorage(Storage):
    """Keep objects in a dict: for tests that would take too long on a disk."""

    url = "memory:///"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def get(self, key: str) -> tuple[bytes, str]:
        try:
            data = self.objects[key]
        except KeyError:
            raise KeyNotFound(key) from None
        return data, _etag(data)

    def get_range(self, key: str, start: int, size: int) -> bytes:
        return self.get(key)[0][start : start + size]

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self.lock:
            etag = _etag(self.objects[key]) if key in self.objects else None
            if (if_absent and etag) or if_match not in (None, etag):
                raise Conflict(key)
            self.objects[key] = data
        return _etag(data)

    def upload_memory(self, key: str, data: memoryview) -> None:
        self.put(key, bytes(data))

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        data = self.get_range(key, start, len(target))
        target[: len(data)] = data
        return len(data)

    def folders(self, prefix: str) -> list[str]:
        top, slash, _ = prefix.rpartition("/")
        paths = (key.removeprefix(top + slash).partition("/") for key in self.list(prefix))
        return sorted({name for name, below, _ in paths if below})

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        with self.lock:
            return sorted(key for key in self.objects if key.startswith(prefix) and key > after)[:limit]

    def sizes(self, prefix: str) -> dict[str, int]:
        with self.lock:
            return {key: len(data) for key, data in sorted(self.objects.items()) if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        with self.lock:
            self.objects.pop(key, None)

    def exists(self, key: str) -> bool:
        return key in self.objects

    def upload(self, path: Path, key: str) -> None:
        self.put(key, path.read_bytes())

    def download(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key)[0])


class Wrapped(MemoryStorage):
    """Forward every operation to another storage, and call `before` and `after`, which tests override."""

    def __init__(self, inner: Storage | None = None) -> None:
        self.inner: Storage = inner or MemoryStorage()
        self.url = self.inner.url

    def before(self, verb: str, key: str) -> None:
        """Run before each operation; an exception from here replaces the operation."""

    def after(self, verb: str, key: str) -> None:
        """Run after each operation; an exception from here is a lost response."""

    def get(self, key: str) -> tuple[bytes, str]:
        return self._do("get", key)

    def get_range(self, key: str, start: int, size: int) -> bytes:
        self.before("get", key)
        data = self.inner.get_range(key, start, size)
        self.after("get", key)
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        return self._do("put", key, data, if_absent=if_absent, if_match=if_match)

    def folders(self, prefix: str) -> list[str]:
        return self._do("folders", prefix)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        return self._do("list", prefix, after=after, limit=limit)

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._do("sizes", prefix)

    def delete(self, key: str) -> None:
        self._do("delete", key)

    def exists(self, key: str) -> bool:
        return self._do("exists", key)

    def upload(self, path: Path, key: str) -> None:
        self.put(key, path.read_bytes())

    def download(self, key: str, path: Path) -> None:
        path.write_bytes(self.get(key)[0])

    def _do(self, verb: str, key: str, *arguments: Any, **options: Any) -> Any:
        self.before(verb, key)
        answer = getattr(self.inner, verb)(key, *arguments, **options)
        self.after(verb, key)
        return answer


class RecordingStorage(Wrapped):
    """Keep a log of changes: (key, bytes put there or None for a deletion)."""

    def __init__(self, inner: Storage | None = None) -> None:
        super().__init__(inner)
        self.log: list[tuple[str, bytes | None]] = []
        self.one = threading.Lock()

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self.one:
            etag = super().put(key, data, if_absent=if_absent, if_match=if_match)
            self.log.append((key, data))
        return etag

    def delete(self, key: str) -> None:
        with self.one:
            super().delete(key)
            self.log.append((key, None))


class FailingStorage(Wrapped):
    """Fail while `away`: any operation, or those whose key contains `only`."""

    def __init__(self, inner: Storage | None = None, only: str = "") -> None:
        super().__init__(inner)
        self.away, self.only, self.refused = False, only, 0

    def before(self, verb: str, key: str) -> None:
        if self.away and self.only in key:
            self.refused += 1
            raise StorageUnavailable(f"{key}: no answer")


class PausedStorage(Wrapped):
    """Pause a process before its n-th operation, and run `meanwhile`."""

    def __init__(self, inner: Storage, moment: int, meanwhile: Callable[[], Any]) -> None:
        super().__init__(inner)
        self.moment, self.meanwhile, self.operations = moment, meanwhile, 0

    def before(self, verb: str, key: str) -> None:
        self.operations += 1
        if self.operations == self.moment:
            self.meanwhile()


def save(run: Run, attempt: int, step: int, parent: CheckpointRef | None = None, **metrics: float) -> CheckpointRef:
    """Save a complete checkpoint of one small file; the fence is checked."""
    ref = CheckpointRef(attempt=attempt, step=step)
    with checkpoint.scratch_folder() as name:
        folder = Path(name)
        (folder / checkpoint.WEIGHTS).write_text(f"weights of {ref}")
        manifest = Manifest(
            step=step,
            samples=step * 10,
            metrics=metrics,
            lineage=LINEAGE.model_copy(update={"parent": parent}),
            files=checkpoint.describe_files(folder),
        )
        upload(run.storage, run.checkpoint_prefix(ref), folder, manifest, lambda: run.fence(attempt))
    return ref


def upload(storage: Storage, prefix: str, folder: Path, manifest: Manifest, fence: Callable[[], None]) -> None:
    """Upload the files of a folder as a checkpoint."""
    for name in manifest.files:
        storage.upload(folder / name, f"{prefix}/{name}")
    checkpoint.complete(storage, prefix, manifest, fence)


def in_threads(n: int, work: Callable[[int], Any]) -> list[Any]:
    """Return what work(0), ..., work(n - 1) return or raise, all started at the same moment."""
    barrier = threading.Barrier(n)

    def start(i: int) -> Any:
        barrier.wait()
        try:
            return work(i)
        except Exception as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
