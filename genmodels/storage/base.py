"""What every storage offers, and which keys there are."""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genmodels.errors import DamagedObject, StorageError

RESERVED = ".storage"  # first name of no key but those of INTERNAL: a local folder keeps its lock there, too
INTERNAL = re.compile(r"\.storage/(marker\.json|probe-[0-9a-f]{32})")  # of `genmodels.storage.marker` and `.probe`
CONDITIONS_NEEDED = (
    "genmodels needs conditional puts (If-None-Match and If-Match): use a store that honours them, e.g. AWS S3, MinIO "
    "or SeaweedFS, or a local folder"
)
MAX_GET_BYTES = 256 * 2**20  # that are read into memory at once; larger objects are downloaded
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class Storage(ABC):
    """Objects under a root. Cheap to make, safe to share between threads; `open_storage(self.url)` is the same storage.

    Every method raises StorageError where the key, the credentials or the bucket are wrong, and StorageUnavailable
    where the store does not answer: then a put may or may not have happened. What was allowed before and is refused now
    is StorageUnavailable as well: see `Refused`.

    Keys of INTERNAL can be read and written; no list shows them.
    """

    url: str

    @abstractmethod
    def get(self, key: str) -> tuple[bytes, str]:
        """An object and its etag, which names this content (opaque).

        Raises:
            KeyNotFound
            DamagedObject: it is larger than anything that is read at once.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store an object durably and return its etag.

        Args:
            if_absent: only if there is no object under this key.
            if_match: only if the object there has this etag.

        Raises:
            Conflict: the condition does not hold. It may be the caller's own write that broke it, if its answer was
                lost and the client tried again; `write_document` tells these apart.
        """

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names of the folders whose path starts with the string `prefix`, sorted: `a/b` finds `bc` of `a/bc/d/e`.

        What lies in them is not walked. A folder is there while a key lies below it.
        """

    @abstractmethod
    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        """Keys that start with the string `prefix`, sorted. `a/` means a folder; `a` would find `ab/c` as well.

        Args:
            after: only keys behind this one, which itself need not be there.
            limit: at most so many, the first ones.

        `after` and `limit` are for prefixes whose keys lie in one folder. Across folders stores differ: to SeaweedFS
        `a/` comes before `a-b/`, to others after it.
        """

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each object whose key starts with the string `prefix`, in the order of `list`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object under exactly this key."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Store a file of any size, durably and whole."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Fetch an object of any size into a file, which appears only when complete. Raises KeyNotFound."""

    def clock(self) -> float | None:
        """The store's time now, in seconds since 1970, where it tells."""
        return None


class Refused(StorageError):
    """The store refuses, for a reason that lies outside of the request: rights, credentials, bucket, mount.

    At the start of a command that is the user's to mend. Once the same kind of operation has succeeded, it is an outage
    that passes: `MeasuredStorage` decides. `reason`: as StorageUnavailable has it.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_key(key: str) -> str:
    names = key.split("/")
    if UNPRINTABLE.search(key) or any(name in ("", ".", "..") or len(name.encode()) > 255 for name in names):
        raise StorageError(
            f"key {key[:300]!r}: must be names of 1 to 255 bytes joined by '/', none of them '.' or '..'"
        )
    if names[0] == RESERVED and not INTERNAL.fullmatch(key):
        raise StorageError(f"key {key!r}: {RESERVED!r} is reserved for lock and temporary files")
    return key


def check_size(key: str, size: int, etag: str) -> None:
    """Raise DamagedObject for an object that would not fit into memory."""
    if size > MAX_GET_BYTES:
        what = f"it has {size:,} bytes, {MAX_GET_BYTES:,} are the most that is read at once"
        raise DamagedObject(key, what, "restore it from a backup or remove it", etag)


def check_prefix(prefix: str) -> str:
    folder, slash, _ = prefix.rpartition("/")
    if slash:
        check_key(folder)
    return prefix


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A path to write to; the file is renamed to `path` at the end, and removed if that is not reached."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
