"""A lease in storage: of all who want to dispatch, or to delete, one holds it. No two clocks are ever compared.

The holder writes the object again every few seconds. Who wants it watches the etag: if it has not changed for the
lease's length of the watcher's own monotonic clock, the holder is taken to be gone. The holder, by its own clock, knows
itself when its time is over. What it still does after that, because it was paused in the middle, is what terms are
for.

A damaged lease is held by someone unknown: it is taken over like that of a holder who is gone, by compare-and-swap on
its etag, after it has stayed unchanged for the lease's length. A holder that lives writes it anew before that. The
number of its term is lost with it, and with a lease that was deleted. Terms must only grow, or states that were
stamped under the old one could not be written any more: so `try_acquire` asks its caller for the highest term that
stands elsewhere (the dispatcher: in the statuses of open runs), and `outgrow` takes note of a higher one that is met
later (in the status of an ended run that is resumed).
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
    remedy = "nothing: it is written anew when its time is over"

    term: LeaseTerm
    holder: str  # "" when it was given back
    renewals: int = 0


class Lease:
    """One who wants to hold it. `renew` and `held` may be called from other threads."""

    def __init__(self, storage: Storage, seconds: float = LEASE_SECONDS, name: str = "dispatcher/lease.json") -> None:
        self.storage, self.seconds, self.name = storage, seconds, name
        self._me = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._mine: tuple[LeaseDocument, str] | None = None  # as written last, and its etag
        self._renewed = 0.0
        self._seen: tuple[str, float] | None = None  # somebody else's etag, and since when
        self._outgrown = 0  # the next term is higher

    def try_acquire(self, stamped: Callable[[], int] = lambda: 0) -> int | None:
        """The term, which only grows, if the lease is this one's now; None while somebody else's is fresh.

        Args:
            stamped: gives the highest term that stands elsewhere; called where the lease's own number is lost.

        Raises:
            StorageUnavailable: nobody can tell.
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
            except Conflict:  # somebody else was quicker
                return None
            return mine.term

    def wait_until_free(self, poll_seconds: float = 0.2) -> None:
        """Return when nobody holds it, or its holder has written nothing for the lease's length."""
        while True:
            current, etag = self._read()
            if not etag or (current and not current.holder) or self._is_stale(etag, time.monotonic()):
                return
            time.sleep(poll_seconds)

    def outgrow(self, term: int) -> None:
        """Make the next term higher than one that was met: it was given before the lease was damaged or deleted."""
        self._outgrown = max(self._outgrown, term)

    def renew(self) -> None:
        """Hold it for another while.

        Raises:
            LeaseLost: somebody else has it.
            StorageUnavailable: try again, as long as it is held.
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
        """Whether it is certain that nobody else has it."""
        return self._mine is not None and time.monotonic() - self._renewed < self.seconds

    def release(self) -> None:
        """Give it back, so that the next one need not wait."""
        with self._lock:
            if self._mine is None:
                return
            (lease, etag), self._mine = self._mine, None
            try:
                body = lease.model_copy(update={"holder": ""}).model_dump(mode="json")
                write_document(self.storage, self.name, body, if_match=etag)
            except Conflict:
                return  # it was somebody else's already

    def _own_etag(self, lease: LeaseDocument) -> str:
        """The etag to go on from: of what this one wrote last and never had an answer to, or of a damaged lease.

        Raises:
            Conflict: the lease is gone, or another's.
        """
        current, etag = self._read()
        if not etag:
            raise Conflict(f"{self.name}: is gone")
        damaged_under_us = current is None and self.held()  # nobody else can have taken it in that time
        if not damaged_under_us and (current is None or (current.holder, current.term) != (self._me, lease.term)):
            raise Conflict(f"{self.name}: is another's")
        return etag

    def _read(self) -> tuple[LeaseDocument | None, str]:
        """The lease (None: damaged, or there is none) and its etag ("": there is none)."""
        try:
            return load_document(self.storage, self.name, LeaseDocument)
        except KeyNotFound:
            return None, ""
        except DamagedObject as error:
            return None, error.etag

    def _is_stale(self, etag: str, at: float) -> bool:
        """Whether an etag, read by now, was there all the time; `at` is after its reading, so no renewal is missed."""
        if self._seen is None or self._seen[0] != etag:
            self._seen = etag, at
        return at - self._seen[1] >= self.seconds

    def _write(self, lease: LeaseDocument, etag: str, began: float) -> None:
        body = lease.model_dump(mode="json")
        written = write_document(self.storage, self.name, body, if_absent=not etag, if_match=etag or None)
        self._mine, self._renewed = (lease, written), began
