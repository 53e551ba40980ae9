"""Implement a storage in a local folder."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from genmodels.errors import Conflict, KeyNotFound, StorageError, StorageUnavailable
from genmodels.storage.base import (
    CONDITIONS_NEEDED,
    MAX_GET_BYTES,
    RESERVED,
    Refused,
    Storage,
    appears_whole,
    check_key,
    check_prefix,
    check_size,
)
from genmodels.storage.disk import AWAY, disk_failure
from genmodels.storage.durable_files import copy, move, remove, remove_stale, sync, write
from genmodels.storage.marker import MARKER, Marker, mark, parse_marker

LOCK_TIMEOUT = 30.0  # seconds after which a lock that another process holds counts as an outage
# Errors of opening a name that is not a regular file; ENXIO: a socket, ELOOP: a link to itself.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ELOOP)

# Errors of a key that can never be written: too long, or with another object in the place of a folder of it.
OF_THE_KEY = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)


class FolderStorage(Storage):
    """Store objects as files: write a temporary file, sync it, rename it under a lock. Reading takes no lock.

    A folder that is unmounted or deleted looks empty, and would be written again on the disk below. So the first writer
    leaves a marker, and each operation reads it before and after: an answer counts only if it is the same folder.

    Args:
        in_use: the folder was written before, so it must have its marker.
    """

    def __init__(self, root: Path, in_use: bool = False) -> None:
        self.url = root.as_uri()
        self._root = root
        self._hidden = root / RESERVED
        # One lock for the whole folder: held for a comparison and a rename, not while data is written.
        self._lock = FileLock(self._hidden / "lock", LOCK_TIMEOUT, poll_interval=0.005, fallback_to_soft=False)
        self._has_cleaned = False
        self._in_use = in_use
        self._marker: tuple[Marker, tuple[int, ...]] | None = None  # and the identity of its file

    def get(self, key: str) -> tuple[bytes, str]:
        with self._errors("get", key), self._open(key) as file:
            check_size(key, os.fstat(file.fileno()).st_size, _file_etag(file))
            data = file.read()
        return data, _sha256(data)

    def get_range(self, key: str, start: int, size: int) -> bytes:
        with self._errors("get", key), self._open(key) as file:
            file.seek(start)
            return file.read(size)

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with self._errors("put", key), self._temporary(key) as temporary:
            temporary.write_bytes(data)
            sync(temporary)
            with self._lock:
                if if_absent and path.is_file():
                    raise Conflict(f"{self.url}/{key}: exists already")
                if if_match is not None and self._etag(key) != if_match:
                    raise Conflict(f"{self.url}/{key}: the object has changed since it was read")
                move(temporary, path)
        return _sha256(data)

    def folders(self, prefix: str) -> list[str]:
        top, slash, _ = check_prefix(prefix).rpartition("/")
        with self._errors("folders", prefix):
            names = (name for name in _names(self._root / top, top + slash) if name.endswith("/"))
            return sorted(Path(name).name for name in names if name.startswith(prefix))

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        top, slash, _ = check_prefix(prefix).rpartition("/")
        with self._errors("list", prefix):
            return list(islice(self._walk(top + slash, prefix, after), limit))

    def sizes(self, prefix: str) -> dict[str, int]:
        sizes = {}
        with self._errors("sizes", prefix):
            for key in self.list(prefix):
                with suppress(FileNotFoundError, NotADirectoryError):  # removed in the meantime
                    sizes[key] = (self._root / key).stat().st_size
        return sizes

    def delete(self, key: str) -> None:
        path = self._path(key)
        if not self.exists(key):
            return
        with self._errors("delete", key):
            self._hidden.mkdir(exist_ok=True)
            with self._lock:
                if path.is_file():
                    remove(path, self._root)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._errors("exists", key):
            return path.is_file()

    def upload(self, path: Path, key: str) -> None:
        target = self._path(key)
        with open(path, "rb") as source, self._errors("upload", key), self._temporary(key) as temporary:
            copy(source, temporary)
            sync(temporary)
            with self._lock:
                move(temporary, target)

    def upload_memory(self, key: str, data: memoryview) -> None:
        target = self._path(key)
        with self._errors("upload", key), self._temporary(key) as temporary:
            write(data, temporary)
            sync(temporary)
            with self._lock:
                move(temporary, target)

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        with self._errors("get", key), self._open(key) as file:
            file.seek(start)
            return file.readinto(target)

    def download(self, key: str, path: Path) -> None:
        with self._errors("download", key), self._open(key) as source, appears_whole(path) as temporary:
            copy(source, temporary)

    def clock(self) -> float | None:
        if not self._root.is_dir():
            return None
        # A network file system has its own clock. Reading it does not mark the folder as in use.
        with self._errors("clock", ""), self._temporary(MARKER) as temporary:
            temporary.touch()
            return temporary.stat().st_mtime

    def _walk(self, top: str, prefix: str, after: str) -> Iterator[str]:
        """Yield the keys below a folder (a path that ends in "/") in order; skip folders without matching keys."""
        for name in _names(self._root / top, top):
            if not name.endswith("/"):
                if name.startswith(prefix) and name > after:
                    yield name
            elif name.startswith(prefix) and (name > after or after.startswith(name)):
                yield from self._walk(name, prefix, after)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _open(self, key: str) -> BufferedReader:
        """Open an object. Anything else with that name (a pipe, a device, a link to itself) is not an object."""
        try:
            file = os.fdopen(
                os.open(self._path(key), os.O_RDONLY | os.O_NONBLOCK), "rb"
            )  # without O_NONBLOCK, opening a pipe would wait
        except OSError as error:
            if error.errno in NO_FILE:
                raise KeyNotFound(f"{self.url}/{key}: no such object") from None
            raise
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        raise KeyNotFound(f"{self.url}/{key}: no such object, but another kind of file has that name")

    def _etag(self, key: str) -> str | None:
        try:
            with self._open(key) as file:
                return _file_etag(file) or _sha256(file.read())
        except KeyNotFound:
            return None

    @contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """Yield a new path in the hidden folder, which is on the same file system as the objects."""
        if self._marker is None:
            self._hidden.mkdir(parents=True, exist_ok=True)
            if key != MARKER:
                mark(self)
        if not self._has_cleaned:
            self._has_cleaned = True
            remove_stale(self._hidden)
        path = self._hidden / f"{secrets.token_hex(16)}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _look(self) -> None:
        """Raise StorageUnavailable if the folder was replaced by another one, or its marker cannot be read any more.

        Raises:
            StorageError: the same, if this process has not used the folder yet.
        """
        try:
            self._compare()
        except StorageUnavailable:
            raise
        except StorageError as error:
            if self._marker is None:
                raise
            raise _gone(str(error)) from None

    def _compare(self) -> None:
        path, known = self._root / MARKER, self._marker  # before the look: another thread may write the marker now
        try:
            facts = path.stat()
            file = facts.st_dev, facts.st_ino, facts.st_mtime_ns
            if known and known[1] == file:
                return
            if not stat.S_ISREG(facts.st_mode):
                raise StorageError(f"{path}: is not a file; remove it, and the next writer makes a new marker")
            marker = parse_marker(self.url, path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            for folder in (self._root, self._hidden):
                if folder.exists() and not folder.is_dir():
                    raise _not_a_folder(self.url, folder) from None
            if known or self._in_use:
                raise _gone(f"{self.url}: the folder is gone or its {MARKER} is missing; mount it again") from None
            return
        if known and known[0].id != marker.id:
            raise _gone(f"{self.url}: the storage was replaced by another one; mount the earlier one again")
        self._marker = marker, file

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}: {action}"
        try:
            self._look()
            try:
                yield
            finally:
                self._look()
        except Timeout:
            raise StorageUnavailable(f"{where}: another process has held the lock for {LOCK_TIMEOUT:.0f} s") from None
        except NotImplementedError:
            raise StorageError(f"{where}: the file system has no file locks (flock); {CONDITIONS_NEEDED}") from None
        except OSError as error:
            raise _convert_error(where, error) from error


def _convert_error(where: str, error: OSError) -> StorageError:
    """Return the error that an error of the file system means."""
    message = f"{where}: {error}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused(f"{message}; check the permissions of the folder", "the storage refuses access")
    if error.errno == errno.EROFS:
        return Refused(message, "the storage is read-only")
    if error.errno in AWAY:
        return StorageUnavailable(message)
    if state := disk_failure(error):
        return StorageUnavailable(message, f"the storage {state}")
    if error.errno in OF_THE_KEY:
        return StorageError(message)
    return Refused(message, "the storage fails")  # of the file system: whatever passed before may pass again


def _not_a_folder(url: str, path: Path) -> StorageError:
    return StorageError(
        f"{url}: {path} is a file, but a storage must be a folder; name another folder or move the file"
    )


def _gone(message: str) -> StorageUnavailable:
    return StorageUnavailable(message, "the folder of the storage is gone")


def _names(folder: Path, path: str) -> list[str]:
    """Return the names in a folder, each after `path`, sorted; folders end in "/", so they sort as their keys do."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if path or entry.name != RESERVED]
            return sorted(f"{path}{entry.name}/" if _is_folder(entry) else f"{path}{entry.name}" for entry in shown)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _file_etag(file: BinaryIO) -> str:
    """Return the etag of a file that is too large to be read at once, "" for any other."""
    facts = os.fstat(file.fileno())
    return f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}" if facts.st_size > MAX_GET_BYTES else ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
