"""Keys that people and programs show to the services: who may generate, submit, administrate, and which models.

    keys/<id>.json      what a key may do, and the sha256 of its secret; the secret itself is nowhere

A token is `gm_<id>_<secret>`. The secret has 256 random bits, so that a plain sha256 cannot be searched for it.
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
FRESH_SECONDS = 5.0  # how long a key is believed to be as it was read: a revoked one works no longer
STALE_SECONDS = 600.0  # the same while the store is away
UNKNOWN_CACHED = 4096  # ids that are nobody's
MAX_LIMIT = 1_000_000  # the highest limit that is not none
TOKEN = r"gm_([0-9a-f]{8})_([A-Za-z0-9_-]{43})"


class Key(Document):
    object_kind = "key"
    remedy = "delete it and make another key: genmodels keys create"

    id: str
    name: str
    scopes: tuple[Scope, ...]
    prefixes: tuple[str, ...] = ()  # of names of models; none: all models
    rate: int | None = None  # requests a minute
    concurrency: int | None = None  # requests at once
    sha256: str
    created: Time
    revoked: Time | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def may_use(self, model: str) -> bool:
        return not self.prefixes or model.startswith(self.prefixes)


@dataclass
class _Seen:
    """A key as it was read, on this process's monotonic clock."""

    key: Key
    read: float
    asked: float = -math.inf  # when the store last failed to say; infinity while somebody waits for it


class Keys:
    """The keys in a storage; safe between threads. What was looked up is believed for FRESH_SECONDS."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._seen: dict[str, _Seen] = {}  # as many as there are keys
        self._unknown: OrderedDict[str, float] = OrderedDict()  # as many as people make up, so bounded
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
        """A new key and its token, which can be had only here.

        Args:
            rate: requests a minute at one gateway replica; None: no limit.
            concurrency: requests under way at once, likewise.

        Raises:
            SpecError: a name, scope, prefix or limit is not one.
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
        """Let a token work that was made elsewhere. One that is known stays as it is, also a revoked one.

        Raises:
            SpecError: it is no token, or its id is another one's.
        """
        match = re.fullmatch(TOKEN, token)
        if match is None:
            raise SpecError("got no key, expected gm_, 8 hex digits, _ and 43 letters, digits, '-' or '_'")
        _check(name, scopes, ())
        key = Key(id=match[1], name=name, scopes=scopes, sha256=_digest(match[2]), created=now())
        try:
            write_document(self.storage, _path(key.id), key.model_dump(mode="json"), if_absent=True)
        except Conflict:
            known = self._read(key.id)
            if known is None or known.sha256 != key.sha256:
                raise SpecError(f"key {key.id} is another one; make a new one") from None
            return known
        self._remember(key.id, key, time.monotonic())
        return key

    def list(self) -> list[Key]:
        """All keys that can be read, also revoked ones, the oldest first."""
        found = []
        for name in list_names(self.storage, "keys/", r"[0-9a-f]{8}\.json"):
            with contextlib.suppress(DamagedObject):
                found.append(self._read(Path(name).stem))
        return sorted(filter(None, found), key=lambda key: (key.created, key.id))

    def any(self) -> bool:
        """Whether there is a key that works."""
        return any(key.revoked is None for key in self.list())

    def revoke(self, id: str) -> Key:
        """End a key. Services that have just seen it notice within FRESH_SECONDS.

        Raises:
            SpecError: there is none.
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
        """Remove every trace of a key. Raises SpecError: that is no id."""
        self.storage.delete(_path(id))
        self._remember(id, None, time.monotonic())

    def check(self, token: str) -> Key | None:
        """The key that a token belongs to, if it is one that works.

        While the store is away, or slow, keys work that were seen in the last STALE_SECONDS, and of those who show the
        same one only one waits for it.

        Raises:
            StorageUnavailable: the store is away, and the key has not been seen lately.
            DamagedObject: what is stored of this key, and of no other.
        """
        match = re.fullmatch(TOKEN, token)
        if match is None:
            return None
        key = self._find(match[1])
        # Also where there is no such key, so that both take the same time.
        same = hmac.compare_digest(_digest(match[2]), key.sha256 if key else "0" * 64)
        return key if key and same and key.revoked is None else None

    def _find(self, id: str) -> Key | None:
        now = time.monotonic()
        with self._lock:
            if now - self._unknown.get(id, -math.inf) < FRESH_SECONDS:
                return None
            seen = self._seen.get(id)
            usable = seen if seen and now - seen.read < STALE_SECONDS else None
            if usable and now - max(usable.read, usable.asked) < FRESH_SECONDS:
                return usable.key
            if seen:
                seen.asked = math.inf
        try:
            key = self._read(id)
        except StorageUnavailable:
            if usable:
                return usable.key
            raise
        finally:
            if seen:
                seen.asked = time.monotonic()
        self._remember(id, key, now)
        return key

    def _read(self, id: str) -> Key | None:
        try:
            return load_document(self.storage, _path(id), Key, id=id)[0]
        except KeyNotFound:
            return None

    def _remember(self, id: str, key: Key | None, read: float) -> None:
        with self._lock:
            self._seen.pop(id, None)
            self._unknown.pop(id, None)
            if key:
                self._seen[id] = _Seen(key, read)
                return
            self._unknown[id] = read
            if len(self._unknown) > UNKNOWN_CACHED:
                self._unknown.popitem(last=False)


def _path(id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{8}", id):
        raise _no_key(id)
    return f"keys/{id}.json"


def _no_key(id: str) -> SpecError:
    return SpecError(f"no key {id[:40]!r}; `genmodels keys list` shows what there is")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check(name: str, scopes: tuple[Scope, ...], prefixes: tuple[str, ...]) -> None:
    if not re.fullmatch(LABEL, name):
        raise SpecError(f"name: got {name[:80]!r}, expected at most 63 lower-case letters, digits and '-'")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise SpecError(f"scope: got {unknown[0] if unknown else 'none'!r}, expected some of {', '.join(SCOPES)}")
    for prefix in prefixes:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", prefix):
            raise SpecError(f"prefix: got {prefix[:80]!r}, expected the beginning of a model's name")
