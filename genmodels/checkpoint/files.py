"""Upload, download and verify the files of a checkpoint."""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from genmodels.checkpoint.manifest import File, Manifest, read_manifest, serving_files, write_manifest
from genmodels.checkpoint.tensor_file import TensorFile
from genmodels.errors import CheckpointError, KeyNotFound, StorageError
from genmodels.storage import Storage
from genmodels.storage.base import check_key
from genmodels.storage.disk import disk_outages

PART_BYTES, PARALLEL_PARTS = 16 * 2**20, 4  # of the reads of one file


def describe_files(folder: Path) -> dict[str, File]:
    """Return the size and sha256 of every file under `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): File(size=path.stat().st_size, sha256=sha256_of(path)) for path in paths
    }


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload_file(storage: Storage, key: str, data: memoryview) -> File:
    """Upload a file that lies in memory, and describe it; its digest is computed during the upload."""
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        digest = pool.submit(lambda: hashlib.sha256(data).hexdigest())
        storage.upload_memory(key, data)
        return File(size=len(data), sha256=digest.result())


def complete(storage: Storage, prefix: str, manifest: Manifest, fence: Callable[[], None]) -> None:
    """Check the fence, then write the manifest: all files must be in storage, and the checkpoint is complete."""
    fence()
    write_manifest(storage, prefix, manifest)


def read_file(storage: Storage, key: str, expected: File) -> bytes:
    """Read a small file and verify its size and sha256.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return bytes(_read_verified(storage, key, expected, memoryview(bytearray(expected.size))))


def read_tensors(storage: Storage, key: str, expected: File, pinned: bool = False) -> TensorFile:
    """Read a safetensors file into memory, in parallel parts, and verify its size and sha256.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    import torch

    memory = torch.empty(expected.size, dtype=torch.uint8, pin_memory=pinned)
    _read_verified(storage, key, expected, memory.numpy().data)
    try:
        return TensorFile(memory)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from None


def _read_verified(storage: Storage, key: str, expected: File, view: memoryview) -> memoryview:
    with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="read") as pool:
        parts = [view[first : first + PART_BYTES] for first in range(0, len(view), PART_BYTES)]
        reads = deque(pool.submit(storage.read_into, key, i * PART_BYTES, part) for i, part in enumerate(parts))
        digest = hashlib.sha256()
        try:
            for part in parts:
                digest.update(part[: reads.popleft().result()])
        except KeyNotFound:
            raise CheckpointError(f"{key}: missing") from None
        finally:
            pool.shutdown(cancel_futures=True)
            reads.clear()  # else a future, its error and this frame would keep the memory in a reference cycle
    if digest.hexdigest() != expected.sha256:
        raise _differs(key)
    return view


def download(storage: Storage, keys: Mapping[str, str], files: Mapping[str, File], folder: Path) -> None:
    """Download files and verify the size and sha256 of each.

    Args:
        keys: the storage key of each file in `files`.
        folder: an empty folder to fill.

    Raises:
        CheckpointError: a file is missing, or its size or sha256 differs.
    """
    for name, expected in files.items():
        try:
            check_key(name)
        except StorageError:
            raise CheckpointError(f"{name!r} is not a valid file name in a checkpoint") from None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(keys[name], path)
        except KeyNotFound:
            raise CheckpointError(f"{keys[name]}: missing") from None
        if path.stat().st_size != expected.size or sha256_of(path) != expected.sha256:
            raise _differs(keys[name])


def fetch(storage: Storage, prefix: str, folder: Path) -> Manifest:
    """Download a checkpoint and verify every byte.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    manifest = read_manifest(storage, prefix)
    download(storage, {name: f"{prefix}/{name}" for name in manifest.files}, manifest.files, folder)
    return manifest


def fetch_serving(storage: Storage, prefix: str, folder: Path) -> None:
    """Download what serves a checkpoint, without `state/`, and verify every byte.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    files = serving_files(read_manifest(storage, prefix).files)
    download(storage, {name: f"{prefix}/{name}" for name in files}, files, folder)


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Make a folder for the files of one checkpoint; remove it at the end.

    Raises:
        StorageUnavailable: the disk of this machine is full or fails; raised instead of the original error.
    """
    with disk_outages(), tempfile.TemporaryDirectory(prefix="genmodels-", ignore_cleanup_errors=True) as name:
        yield name


def _differs(key: str) -> CheckpointError:
    return CheckpointError(f"{key}: damaged (size or sha256 differs from the manifest)")
