"""Create, check and revoke API keys: which scopes and models a client may use.

    keys/<id>.json      what a key allows, and the sha256 of its secret; the secret itself is not stored

A token is `gm_<id>_<secret>`. The secret has 256 random bits, so it cannot be recovered from a plain sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from genmodels.errors import Conflict, DamagedObject, KeyNotFound, SpecError, StorageUnavailable
from genmodels.spec.names import LABEL
from genmodels.storage import Document, Storage, Time, list_names, load_document, write_document
from genmodels.storage.documents import now

Scope = Literal["generate", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
FRESH_SECONDS = (
    5.0  # how long a key that was read is used without another read: the longest that a revoked key still works
)
STALE_SECONDS = 600.0  # the same while the store is unavailable
UNKNOWN_CACHED = 4096  # ids without a key that are remembered
MAX_LIMIT = 1_000_000  # largest limit; a higher one would limit nothing
TOKEN = r"gm_([0-9a-f]{8})_([A-Za-z0-9_-]{43})"


class Key(Document):
    object_kind = "key"
    remedy = "delete it and make another key: genmodels keys create"

    id: str
    name: str
    scopes: tuple[Scope, ...]
    prefixes: tuple[str, ...] = ()  # prefixes of model names; empty: all models
    rate: int | None = None  # requests per minute
    concurrency: int | None = None  # concurrent requests
    sha256: str
    created: Time
    revoked: Time | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def may_use(self, model: str) -> bool:
        return not self.prefixes or model.startswith(self.prefixes)


@dataclass
class _CachedKey:
    """Hold a key and the time of its last read, on the monotonic clock of this process."""

    key: Key
    read: float
    failed_at: float = -math.inf  # when the store last failed to answer; infinity while a thread waits for the store


class Keys:
    """Manage the keys in a storage; thread-safe. A key is read again after FRESH_SECONDS."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._cached: dict[str, _CachedKey] = {}  # at most as many as keys exist
        self._unknown: OrderedDict[str, float] = OrderedDict()  # clients can invent any number of ids, so it is bounded
        self._lock = threading.Lock()

    def create(
        self,
        name: str,
        scopes: tuple[Scope, ...],
        prefixes: tuple[str, ...] = (),
        *,
        rate: int | None = None,
        concurrency: int | None = None,
    ) -> tuple[Key, str]:
        """Create a key and return it with its token, which is available only here.

        Args:
            rate: requests per minute at one gateway replica; None: no limit.
            concurrency: concurrent requests at one gateway replica; None: no limit.

        Raises:
            SpecError: a name, scope, prefix or limit is invalid.
        """
        _check(name, scopes, prefixes)
        for limit, value in (("rate", rate), ("concurrency", concurrency)):
            if value is not None and not 1 <= value <= MAX_LIMIT:
                raise SpecError(f"{limit}: got {value}, expected 1 to {MAX_LIMIT:,}; leave it out for no limit")
        secret = secrets.token_urlsafe(32)
        while True:
            key = Key(
                id=secrets.token_hex(4),
                name=name,
                scopes=scopes,
                prefixes=prefixes,
                rate=rate,
                concurrency=concurrency,
                sha256=_digest(secret),
                created=now(),
            )
            try:
                write_document(self.storage, _path(key.id), key.model_dump(mode="json"), if_absent=True)
            except Conflict:
                continue  # the id is taken
            return key, f"gm_{key.id}_{secret}"

    def admit(self, token: str, name: str, scopes: tuple[Scope, ...]) -> Key:
        """Accept a token that was made elsewhere. A known token does not change, even if it is revoked.

        Raises:
            SpecError: the token is malformed, or another key has its id.
        """
        match = re.fullmatch(TOKEN, token)
        if match is None:
            raise SpecError("not a key: write gm_, 8 hex digits, _ and 43 letters, digits, '-' or '_'")
        _check(name, scopes, ())
        key = Key(id=match[1], name=name, scopes=scopes, sha256=_digest(match[2]), created=now())
        try:
            write_document(self.storage, _path(key.id), key.model_dump(mode="json"), if_absent=True)
        except Conflict:
            known = self._read(key.id)
            if known is None or known.sha256 != key.sha256:
                raise SpecError(f"another key has the id {key.id}; create a new key: genmodels keys create") from None
            return known
        self._remember(key.id, key, time.monotonic())
        return key

    def list(self) -> list[Key]:
        """Return all keys that can be read, including revoked ones, the oldest first."""
        keys = []
        for name in list_names(self.storage, "keys/", r"[0-9a-f]{8}\.json"):
            with contextlib.suppress(DamagedObject):
                keys.append(self._read(Path(name).stem))
        return sorted(filter(None, keys), key=lambda key: (key.created, key.id))

    def any(self) -> bool:
        """Return whether a key exists that is not revoked."""
        return any(key.revoked is None for key in self.list())

    def revoke(self, id: str) -> Key:
        """Revoke a key. Services that have just read it notice within FRESH_SECONDS.

        Raises:
            SpecError: the key does not exist.
        """
        while True:
            try:
                key, etag = load_document(self.storage, _path(id), Key, id=id)
            except KeyNotFound:
                raise _no_key(id) from None
            if key.revoked is None:
                key = key.model_copy(update={"revoked": now()})
                try:
                    write_document(self.storage, _path(id), key.model_dump(mode="json"), if_match=etag)
                except Conflict:
                    continue
            self._remember(id, key, time.monotonic())
            return key

    def delete(self, id: str) -> None:
        """Remove a key from storage. Raises SpecError if the id is invalid."""
        self.storage.delete(_path(id))
        self._remember(id, None, time.monotonic())

    def check(self, token: str) -> Key | None:
        """Return the key of a token; None if the token is wrong or the key is revoked.

        While the store is unavailable or slow, keys that were read in the last STALE_SECONDS work, and only one
        request for each key waits for the store.

        Raises:
            StorageUnavailable: the store is unavailable, and the key was not read in the last STALE_SECONDS.
            DamagedObject: the stored object of this key is damaged; other keys work.
        """
        match = re.fullmatch(TOKEN, token)
        if match is None:
            return None
        key = self._find(match[1])
        # Compare also if the key does not exist, so that both cases take the same time.
        same = hmac.compare_digest(_digest(match[2]), key.sha256 if key else "0" * 64)
        return key if key and same and key.revoked is None else None

    def _find(self, id: str) -> Key | None:
        now = time.monotonic()
        with self._lock:
            if now - self._unknown.get(id, -math.inf) < FRESH_SECONDS:
                return None
            cached = self._cached.get(id)
            usable = cached if cached and now - cached.read < STALE_SECONDS else None
            if usable and now - max(usable.read, usable.failed_at) < FRESH_SECONDS:
                return usable.key
            if cached:
                cached.failed_at = math.inf
        try:
            key = self._read(id)
        except StorageUnavailable:
            if usable:
                return usable.key
            raise
        finally:
            if cached:
                cached.failed_at = time.monotonic()
        self._remember(id, key, now)
        return key

    def _read(self, id: str) -> Key | None:
        try:
            return load_document(self.storage, _path(id), Key, id=id)[0]
        except KeyNotFound:
            return None

    def _remember(self, id: str, key: Key | None, read: float) -> None:
        with self._lock:
            self._cached.pop(id, None)
            self._unknown.pop(id, None)
            if key:
                self._cached[id] = _CachedKey(key, read)
                return
            self._unknown[id] = read
            if len(self._unknown) > UNKNOWN_CACHED:
                self._unknown.popitem(last=False)


def _path(id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{8}", id):
        raise _no_key(id)
    return f"keys/{id}.json"


def _no_key(id: str) -> SpecError:
    return SpecError(f"no key {id[:40]!r}; `genmodels keys list` shows the ids of all keys")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check(name: str, scopes: tuple[Scope, ...], prefixes: tuple[str, ...]) -> None:
    if not re.fullmatch(LABEL, name):
        raise SpecError(f"name: got {name[:80]!r}, expected at most 63 lower-case letters, digits and '-'")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise SpecError(
            f"scope: got {unknown[0] if unknown else 'none'!r}, expected one or more of {', '.join(SCOPES)}"
        )
    for prefix in prefixes:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", prefix):
            raise SpecError(f"prefix: got {prefix[:80]!r}, expected the beginning of a model name")
