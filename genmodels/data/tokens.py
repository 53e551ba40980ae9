"""Keep the token ids of a large text in a file of this machine's cache, from which windows are read through a mapping.

Each process of the machine maps the same file, which is made once for each text and vocabulary. It is a NumPy file
(`.npy`), written part by part and renamed when complete: no process ever holds a large text in memory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from filelock import FileLock

from genmodels.data.sources import cache_folder
from genmodels.errors import DataError
from genmodels.storage.disk import disk_outages

MAX_IN_MEMORY = 2**24  # tokens; a longer text is mapped


def hold(
    name: str, count: int, dtype: np.dtype[np.unsignedinteger], parts: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """Return `count` token ids: in memory, or mapped from the cache if there are many.

    Args:
        name: names text and vocabulary; the file of this name is used again.
        parts: return the token ids part by part.
    """
    if count <= MAX_IN_MEMORY:
        return np.concatenate([np.empty(0, dtype), *parts()], dtype=dtype)
    path = cache_folder() / "tokens" / f"{name}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (tokens := _mapped(path, count, dtype)) is None:
                _write(path, count, dtype, parts())
                tokens = _mapped(path, count, dtype)
    except OSError as error:
        where = "set XDG_CACHE_HOME to another folder"
        raise DataError(f"data: {path.parent} cannot be written ({error.strerror}); {where}") from error
    assert tokens is not None
    return tokens


def _write(path: Path, count: int, dtype: np.dtype[np.unsignedinteger], parts: Iterable[np.ndarray]) -> None:
    part_path = path.with_suffix(".part")  # the lock keeps other processes away
    try:
        with disk_outages(), part_path.open("wb") as file:
            file.write(_header(count, dtype))
            for part in parts:
                file.write(part.astype(dtype, copy=False).data)
            file.flush()
            os.fsync(file.fileno())
            part_path.replace(path)
    finally:
        part_path.unlink(missing_ok=True)  # else a file that was begun would keep a full disk full


def _mapped(path: Path, count: int, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray | None:
    """Map a file; None if it is missing, or not what it should be."""
    header = _header(count, dtype)
    try:
        with path.open("rb") as file:
            begins = file.read(len(header))
    except FileNotFoundError:
        return None
    if begins != header or path.stat().st_size != len(header) + count * dtype.itemsize:
        return None
    return np.memmap(path, dtype, "r", len(header), (count,)).view(np.ndarray)


def _header(count: int, dtype: np.dtype[np.unsignedinteger]) -> bytes:
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()
