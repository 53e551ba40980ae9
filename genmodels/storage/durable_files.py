"""Write, rename and remove files so that the change survives a power loss when the call returns."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from genmodels.errors import StorageError

WRITTEN_BYTES = 16 * 2**20  # at once
STALE_TEMPORARY = 86_400.0  # seconds after which a temporary file must come from a killed process


def copy(source: BinaryIO, path: Path) -> None:
    with open(path, "xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def write(data: memoryview, path: Path) -> None:
    with open(path, "xb") as target:
        for first in range(0, len(data), WRITTEN_BYTES):
            target.write(data[first : first + WRITTEN_BYTES])


def move(temporary: Path, path: Path) -> None:
    """Rename a file durably; make its folders."""
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageError(f"{path}: a key cannot be an object and the folder of others: {error.strerror}") from error
    for folder in (path.parent, *(folder.parent for folder in new)):
        sync(folder)


def remove(path: Path, root: Path) -> None:
    """Remove a file durably, with its empty folders: a later object may need one of their names."""
    path.unlink()
    folder = path.parent
    while folder != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
    sync(folder)


def sync(path: Path) -> None:
    """Write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(hidden: Path) -> None:
    """Remove temporary files that are so old that they come from a killed process."""
    for path in hidden.glob("*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_TEMPORARY:
                path.unlink()
