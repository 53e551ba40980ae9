"""Keep the token ids of a large text in a file of this machine's cache, from which windows are read through a mapping.

Each process of the machine maps the same file, which is made once for each text and vocabulary. It is a NumPy file
(`.npy`), written part by part and renamed when complete: no process ever holds a large text in memory.
"""

from __future__ import annotations

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
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    part_path = path.with_suffix(".part")  # the lock keeps other processes away
    with disk_outages(), part_path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype(dtype, copy=False).data)
        file.flush()
        os.fsync(file.fileno())
        part_path.replace(path)


def _mapped(path: Path, count: int, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray | None:
    """Map a file; None if it is missing, or not what it should be."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (FileNotFoundError, EOFError, ValueError):
        return None
    return tokens.view(np.ndarray) if tokens.shape == (count,) and tokens.dtype == dtype else None
