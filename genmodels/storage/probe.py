"""Check that a store supports conditional puts, on which leases, job ids and attempt numbers rely."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable

from genmodels.errors import Conflict, StorageError
from genmodels.storage.base import CONDITIONS_NEEDED, RESERVED, Storage
from genmodels.storage.marker import Marker, mark

OTHER_ETAG = '"00000000000000000000000000000000"'  # matches no object


def begin_writing(storage: Storage) -> Marker:
    """Check at the start of a process that it may write and that conditional puts work; mark the storage as used.

    Makes five requests, seven if there is no marker yet.

    Raises:
        StorageError: the store cannot be used: rights, format, or conditional puts; the message says what to do.
    """
    probe_conditional_puts(storage)
    return mark(storage)


def probe_conditional_puts(storage: Storage) -> None:
    """Check that a store supports `if_absent` and `if_match`, with four requests on an object that is then removed.

    Raises:
        StorageError: the store ignores a condition.
    """
    key = f"{RESERVED}/probe-{secrets.token_hex(16)}"  # its own key, so that many probes can run at once
    try:
        with contextlib.suppress(Conflict):  # caused by an earlier try of this put, whose answer was lost
            storage.put(key, b"1", if_absent=True)
        _expect_conflict(storage, "If-None-Match", lambda: storage.put(key, b"2", if_absent=True))
        _expect_conflict(storage, "If-Match", lambda: storage.put(key, b"3", if_match=OTHER_ETAG))
    finally:
        with contextlib.suppress(StorageError):  # an earlier error says more
            storage.delete(key)


def _expect_conflict(storage: Storage, header: str, put: Callable[[], str]) -> None:
    try:
        put()
    except Conflict:
        return
    raise StorageError(
        f"{storage.url}: the store ignores {header}: two processes would overwrite each other's work, and one job "
        f"would run twice; {CONDITIONS_NEEDED}"
    )
