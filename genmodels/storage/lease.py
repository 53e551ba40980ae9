"""Hold a lease in storage: only one process dispatches, or deletes, at a time. Clocks are never compared.

The holder writes the object again every few seconds. A process that wants the lease watches its etag: if the etag has
not changed for the length of the lease, on the monotonic clock of that process, the holder counts as gone. The holder
knows by its own clock when its time has ended. If it was paused and acts later, its term is too low, and its writes
are refused.

A damaged lease has an unknown holder. It is taken over like the lease of a holder that is gone: by compare-and-swap on
its etag, after it has not changed for the length of the lease. A live holder writes it again before that. A damaged or
deleted lease loses its term. Terms must only grow: a holder with a lower term could not write states any more. So
`try_acquire` asks the caller for the highest term that is stored elsewhere (the dispatcher reads the statuses of open
runs), and `outgrow` records a higher term that is read later (in the status of an ended run that is resumed).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from genmodels.errors import Conflict, DamagedObject, KeyNotFound, LeaseLost
from genmodels.storage import Document, Storage, load_document, write_document

LEASE_SECONDS = 15.0
# A higher term is damage. Far below what fits, as the next term must be readable too, wherever it is stamped.
LeaseTerm = Annotated[int, Field(ge=0, lt=2**40)]


class LeaseDocument(Document):
    object_kind = "lease"
    remedy = "nothing to do: it is written again when its time has ended"

    term: LeaseTerm
    holder: str  # "" after its release
    renewals: int = 0


class Lease:
    """Acquire, renew and release a lease. `renew` and `held` may be called from other threads."""

    def __init__(self, storage: Storage, seconds: float = LEASE_SECONDS, name: str = "dispatcher/lease.json") -> None:
        self.storage, self.seconds, self.name = storage, seconds, name
        self._me = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._mine: tuple[LeaseDocument, str] | None = None  # as last written, and its etag
        self._renewed = 0.0
        self._seen: tuple[str, float] | None = None  # etag of another holder, and since when
        self._outgrown = 0  # the next term is higher than this

    def try_acquire(self, stamped: Callable[[], int] = lambda: 0) -> int | None:
        """Acquire the lease and return its term, which only grows; return None while another holder has it.

        Args:
            stamped: returns the highest term that is stored elsewhere; called if the lease has lost its term.

        Raises:
            StorageUnavailable: the holder is unknown.
        """
        with self._lock:
            began = time.monotonic()
            current, etag = self._read()
            is_free = current is not None and current.holder in ("", self._me)
            if etag and not is_free and not self._is_stale(etag, time.monotonic()):
                return None
            last = current.term if current else stamped()
            mine = LeaseDocument(term=max(last, self._outgrown) + 1, holder=self._me)
            try:
                self._write(mine, etag, began)
            except Conflict:  # another process was faster
                return None
            return mine.term

    def wait_until_free(self, poll_seconds: float = 0.2) -> None:
        """Return when the lease is free, or its holder has written nothing for the length of the lease."""
        while True:
            current, etag = self._read()
            if not etag or (current and not current.holder) or self._is_stale(etag, time.monotonic()):
                return
            time.sleep(poll_seconds)

    def outgrow(self, term: int) -> None:
        """Make the next term higher than `term`, which was given before the lease was damaged or deleted."""
        self._outgrown = max(self._outgrown, term)

    def renew(self) -> None:
        """Extend the lease.

        Raises:
            LeaseLost: another process holds the lease.
            StorageUnavailable: try again while the lease is held.
        """
        with self._lock:
            if self._mine is None:
                raise LeaseLost("the lease is not held")
            lease, etag = self._mine
            began = time.monotonic()
            try:
                try:
                    self._write(lease.model_copy(update={"renewals": lease.renewals + 1}), etag, began)
                except Conflict:
                    self._write(lease.model_copy(update={"renewals": lease.renewals + 2}), self._own_etag(lease), began)
            except Conflict:
                self._mine = None
                raise LeaseLost(f"the lease of term {lease.term} was taken over by another dispatcher") from None

    def held(self) -> bool:
        """Return whether it is certain that no other process holds the lease."""
        return self._mine is not None and time.monotonic() - self._renewed < self.seconds

    def release(self) -> None:
        """Release the lease, so that the next process need not wait."""
        with self._lock:
            if self._mine is None:
                return
            (lease, etag), self._mine = self._mine, None
            try:
                body = lease.model_copy(update={"holder": ""}).model_dump(mode="json")
                write_document(self.storage, self.name, body, if_match=etag)
            except Conflict:
                return  # another process has it already

    def _own_etag(self, lease: LeaseDocument) -> str:
        """Return the etag to continue from: of the last own write, whose answer was lost, or of a damaged lease.

        Raises:
            Conflict: the lease is gone, or another process holds it.
        """
        current, etag = self._read()
        if not etag:
            raise Conflict(f"{self.name}: is gone")
        damaged_under_us = current is None and self.held()  # no other process can have taken it in that time
        if not damaged_under_us and (current is None or (current.holder, current.term) != (self._me, lease.term)):
            raise Conflict(f"{self.name}: is held by another process")
        return etag

    def _read(self) -> tuple[LeaseDocument | None, str]:
        """Read the lease (None: damaged or missing) and its etag ("": missing)."""
        try:
            return load_document(self.storage, self.name, LeaseDocument)
        except KeyNotFound:
            return None, ""
        except DamagedObject as error:
            return None, error.etag

    def _is_stale(self, etag: str, at: float) -> bool:
        """Return whether an etag has not changed for the length of the lease; `at`: a time after the etag was read."""
        if self._seen is None or self._seen[0] != etag:
            self._seen = etag, at
        return at - self._seen[1] >= self.seconds

    def _write(self, lease: LeaseDocument, etag: str, began: float) -> None:
        body = lease.model_dump(mode="json")
        written = write_document(self.storage, self.name, body, if_absent=not etag, if_match=etag or None)
        self._mine, self._renewed = (lease, written), began
