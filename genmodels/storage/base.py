"""Define the interface of every storage, and which keys are valid."""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from genmodels.errors import DamagedObject, StorageError

RESERVED = ".storage"  # only keys of INTERNAL begin with this name; a local folder keeps its lock there too
INTERNAL = re.compile(r"\.storage/(marker\.json|probe-[0-9a-f]{32})")  # of `genmodels.storage.marker` and `.probe`
CONDITIONS_NEEDED = (
    "genmodels needs conditional puts (If-None-Match and If-Match): use a store that supports them, e.g. AWS S3, MinIO "
    "or SeaweedFS, or a local folder"
)
MAX_GET_BYTES = 256 * 2**20  # largest object that is read into memory; larger ones are downloaded
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class PartialUpload:
    """An upload in parts that has not ended: its parts take room, and no list of objects shows them."""

    key: str
    id: str
    bytes: int  # of the parts that have arrived


class Storage(ABC):
    """Store objects under a root. Cheap to make, thread-safe; `open_storage(self.url)` is the same storage.

    Every method raises StorageError if the key, the credentials or the bucket are wrong, and StorageUnavailable if the
    store does not answer: a put may then have happened or not. An operation that was allowed before and is refused now
    raises StorageUnavailable too: see `Refused`.

    Keys of INTERNAL can be read and written; lists do not show them.
    """

    url: str

    @abstractmethod
    def get(self, key: str) -> tuple[bytes, str]:
        """Return an object and its etag, an opaque name of this content.

        Raises:
            KeyNotFound: no object has this key.
            DamagedObject: the object is larger than MAX_GET_BYTES.
        """

    def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """Return an object and its etag; None if it still has the given etag.

        This default reads the object: the etag of a local folder is the hash of the content, since times of files are
        too coarse, and a file that is polled is small.

        Raises:
            KeyNotFound: no object has this key.
            DamagedObject: the object is larger than MAX_GET_BYTES.
        """
        answer = self.get(key)
        return None if answer[1] == etag else answer

    @abstractmethod
    def get_range(self, key: str, start: int, size: int) -> bytes:
        """Return at most `size` bytes of an object, from the byte `start` on; fewer only at the end of the object.

        An object may be replaced between two ranges. So read objects by ranges only if they never change, or only grow.

        Raises:
            KeyNotFound: no object has this key.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store an object durably and return its etag.

        Args:
            if_absent: store only if no object has this key.
            if_match: store only if the object with this key has this etag.

        Raises:
            Conflict: the condition does not hold. The cause may be an earlier try of the same put whose answer was
                lost; `write_document` detects this case.
        """

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Return names of folders whose path starts with the string `prefix`, sorted: `a/b` finds `bc` of `a/bc/d/e`.

        The content of the folders is not listed. A folder exists while a key lies below it.
        """

    @abstractmethod
    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        """Return the keys that start with the string `prefix`, sorted. `a/` means a folder; `a` would also find `ab/c`.

        Args:
            after: return only keys after this one, which need not exist.
            limit: return at most this many keys, the first ones.

        Use `after` and `limit` only for prefixes whose keys lie in one folder. Across folders the order depends on the
        store: SeaweedFS lists `a/` before `a-b/`, others after it.
        """

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of each object whose key starts with the string `prefix`, in the order of `list`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; do nothing if it does not exist."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether an object has exactly this key."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Store a file of any size, durably and whole."""

    @abstractmethod
    def upload_memory(self, key: str, data: memoryview) -> None:
        """Store bytes of any size that lie in memory, durably and whole, without a second copy of them.

        Args:
            data: bytes (format "B") that do not change during the upload. Large data is sent in parts, in parallel.
        """

    @abstractmethod
    def read_into(self, key: str, start: int, target: memoryview) -> int:
        """Fill memory with the bytes of an object, from the byte `start` on, as `get_range` does.

        Returns:
            The number of bytes read; fewer than `target` has only at the end of the object.

        Raises:
            KeyNotFound: no object has this key.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Download an object of any size to a file, which appears only when complete. Raises KeyNotFound."""

    def partial_uploads(self, seconds: float) -> Sequence[PartialUpload]:
        """Return the uploads in parts that began so many seconds ago and have not ended.

        None in a store that has no such uploads, or does not list them to this process.
        """
        return []

    def abort_upload(self, upload: PartialUpload) -> None:
        """Remove the parts of an upload; it may have ended meanwhile."""
        return

    def clock(self) -> float | None:
        """Return the time of the store, in seconds since 1970; None if the store does not report it."""
        return None


class Refused(StorageError):
    """Report a refusal whose cause lies outside the request: rights, credentials, bucket, mount.

    At the start of a command the user has to fix it. After the same kind of operation has succeeded, it counts as an
    outage: `MeasuredStorage` decides. `reason`: as in StorageUnavailable.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_key(key: str) -> str:
    """Return a valid key. Raises StorageError otherwise."""
    names = key.split("/")
    if UNPRINTABLE.search(key) or any(name in ("", ".", "..") or len(name.encode()) > 255 for name in names):
        raise StorageError(
            f"key {key[:300]!r}: must be names of 1 to 255 bytes joined by '/', none of them '.' or '..'"
        )
    if names[0] == RESERVED and not INTERNAL.fullmatch(key):
        raise StorageError(f"key {key!r}: {RESERVED!r} is reserved for lock and temporary files")
    return key


def check_size(key: str, size: int, etag: str) -> None:
    """Raise DamagedObject if an object is too large to read into memory."""
    if size > MAX_GET_BYTES:
        what = f"it has {size:,} bytes, the limit is {MAX_GET_BYTES:,}"
        raise DamagedObject(key, what, "restore it from a backup or remove it", etag)


def check_prefix(prefix: str) -> str:
    """Return a prefix whose folder is a valid key. Raises StorageError otherwise."""
    folder, slash, _ = prefix.rpartition("/")
    if slash:
        check_key(folder)
    return prefix


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end, or remove it after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
