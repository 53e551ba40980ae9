"""A lease in storage: of all who want to dispatch, or to delete, one holds it. No two clocks are ever compared.

The holder writes the object again every few seconds. Who wants it watches the etag: if it has not changed for the
lease's length of the watcher's own monotonic clock, the holder is taken to be gone. The holder, by its own clock, knows
itself when its time is over. What it still does after that, because it was paused in the middle, is what epochs are
for.
"""

from __future__ import annotations

import secrets
import threading
import time

from pydantic import BaseModel, ConfigDict

from genmodels.errors import Conflict, KeyNotFound, LeaseLost
from genmodels.storage import Storage, read_document, write_document

LEASE_SECONDS = 15.0


class _Lease(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    epoch: int
    holder: str  # "" when it was given back
    beat: int = 0


class Lease:
    """One who wants to hold it. `renew` and `held` may be called from other threads."""

    def __init__(self, storage: Storage, seconds: float = LEASE_SECONDS, name: str = "dispatcher/lease.json") -> None:
        self.storage, self.seconds, self.name = storage, seconds, name
        self._me = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._mine: tuple[_Lease, str] | None = None  # as written last, and its etag
        self._renewed = 0.0
        self._seen: tuple[str, float] | None = None  # somebody else's etag, and since when

    def try_acquire(self) -> int | None:
        """The epoch, which only grows, if the lease is this one's now; None while somebody else's is fresh.

        Raises:
            StorageUnavailable: nobody can tell.
        """
        with self._lock:
            began = time.monotonic()
            try:
                document, etag = read_document(self.storage, self.name)
                current = _Lease.model_validate(document)
            except KeyNotFound:
                current, etag = _Lease(epoch=0, holder=""), ""
            if current.holder not in ("", self._me) and not self._is_stale(etag, time.monotonic()):
                return None
            mine = _Lease(epoch=current.epoch + 1, holder=self._me)
            try:
                self._write(mine, etag, began)
            except Conflict:  # somebody else was quicker
                return None
            return mine.epoch

    def wait_until_free(self, poll_seconds: float = 0.2) -> None:
        """Return when nobody holds it, or its holder has written nothing for the lease's length."""
        while True:
            try:
                document, etag = read_document(self.storage, self.name)
            except KeyNotFound:
                return
            if not _Lease.model_validate(document).holder or self._is_stale(etag, time.monotonic()):
                return
            time.sleep(poll_seconds)

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
                    self._write(lease.model_copy(update={"beat": lease.beat + 1}), etag, began)
                except Conflict:
                    self._write(lease.model_copy(update={"beat": lease.beat + 2}), self._own_etag(lease), began)
            except Conflict:
                self._mine = None
                raise LeaseLost(f"the lease of epoch {lease.epoch} was taken over by another dispatcher") from None

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

    def _own_etag(self, lease: _Lease) -> str:
        """The etag of what this one wrote last, if it never had an answer to that. Raises Conflict."""
        try:
            document, etag = read_document(self.storage, self.name)
        except KeyNotFound:
            raise Conflict(f"{self.name}: is gone") from None
        current = _Lease.model_validate(document)
        if (current.holder, current.epoch) != (self._me, lease.epoch):
            raise Conflict(f"{self.name}: is another's")
        return etag

    def _is_stale(self, etag: str, at: float) -> bool:
        """Whether an etag, read by now, was there all the time; `at` is after its reading, so no renewal is missed."""
        if self._seen is None or self._seen[0] != etag:
            self._seen = etag, at
        return at - self._seen[1] >= self.seconds

    def _write(self, lease: _Lease, etag: str, began: float) -> None:
        body = lease.model_dump(mode="json")
        written = write_document(self.storage, self.name, body, if_absent=not etag, if_match=etag or None)
        self._mine, self._renewed = (lease, written), began
