"""Which errors of a disk are outages: it is full, fails, or was taken away. The same for a storage in a folder and for
this machine's scratch files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from genmodels.errors import StorageUnavailable

FULL = (errno.ENOSPC, errno.EDQUOT)
# The device, or a limit of this machine. Rights are not among them: see `Refused`.
FAILING = (
    *(errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ENOTCONN, errno.ENOLCK),
)
# Of a folder on another machine. A download has these as well, and there they say nothing of the disk.
AWAY = (errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNREFUSED)
# Libraries in Rust and Ray pass on only the text.
_FULL_TEXTS = tuple(os.strerror(number) for number in FULL)


def disk_failure(error: BaseException) -> str:
    """Return what is wrong with the disk, to follow a noun ("is full"), or "" if the error is of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or any(text in str(error) for text in _FULL_TEXTS):
        return "is full"
    return "fails" if number in FAILING else ""


def outage_of_disk(error: BaseException) -> StorageUnavailable | None:
    """Return the outage of this machine's disk that an error comes from, directly or as its cause."""
    if isinstance(error, StorageUnavailable):
        return error
    link: BaseException | None = error
    while link is not None:
        if state := disk_failure(link):
            reason = f"the disk of this machine {state}"
            return StorageUnavailable(f"{reason}: {' '.join(str(link).split())}", reason)
        link = link.__cause__ or link.__context__
    return None


@contextmanager
def disk_outages() -> Iterator[None]:
    """Raise StorageUnavailable instead of whatever a full or failing disk of this machine made of itself."""
    try:
        yield
    except Exception as error:
        outage = outage_of_disk(error)
        if outage is None or outage is error:
            raise
        raise outage from error
