"""Tell which disk errors are outages: the disk is full, fails, or is gone.

The rules are the same for a storage in a folder and for scratch files of this machine.
"""

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
# Of a folder on another machine. A download raises these too; there they do not concern the disk.
AWAY = (errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNREFUSED)
# Ray and libraries in Rust keep only the text of an error.
_FULL_TEXTS = tuple(os.strerror(number) for number in FULL)


def disk_failure(error: BaseException) -> str:
    """Return what is wrong with the disk as a verb phrase ("is full"); "" for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or any(text in str(error) for text in _FULL_TEXTS):
        return "is full"
    return "fails" if number in FAILING else ""


def outage_of_disk(error: BaseException) -> StorageUnavailable | None:
    """Return the disk outage that an error reports, itself or by its cause; None if it reports none."""
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
    """Raise StorageUnavailable instead of any error that a full or failing disk of this machine causes."""
    try:
        yield
    except Exception as error:
        outage = outage_of_disk(error)
        if outage is None or outage is error:
            raise
        raise outage from error
