"""Keys that people and programs show to the services: who may generate, submit, administrate, and which models.

    keys/<id>.json      what a key may do, and the sha256 of its secret; the secret itself is nowhere

A token is `gm_<id>_<secret>`. The secret has 256 random bits, so that a plain sha256 cannot be searched for it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from typing import Literal, get_args

from genmodels.checkpoint import Document
from genmodels.errors import Conflict, KeyNotFound, SpecError, StorageUnavailable
from genmodels.run import now
from genmodels.spec import LABEL
from genmodels.storage import Storage, read_document, write_document

Scope = Literal["generate", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
FRESH_SECONDS = 5.0  # how long a key is believed to be as it was read: a revoked one works no longer
STALE_SECONDS = 600.0  # the same while the store is away
CACHED = 4096
TOKEN = r"gm_([0-9a-f]{8})_([A-Za-z0-9_-]{43})"


class Key(Document):
    id: str
    name: str
    scopes: tuple[Scope, ...]
    prefixes: tuple[str, ...] = ()  # of names of models; none: all models
    sha256: str
    created: str
    revoked: str | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def may_use(self, model: str) -> bool:
        return not self.prefixes or model.startswith(self.prefixes)


class Keys:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._cache: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()
        self._lock = threading.Lock()

    def create(self, name: str, scopes: tuple[Scope, ...], prefixes: tuple[str, ...] = ()) -> tuple[Key, str]:
        """A new key and its token, which can be had only here.

        Raises:
            SpecError: a name, scope or prefix is not one.
        """
        _check(name, scopes, prefixes)
        secret = secrets.token_urlsafe(32)
        while True:
            key = Key(
                id=secrets.token_hex(4),
                name=name,
                scopes=scopes,
                prefixes=prefixes,
                sha256=_digest(secret),
                created=now(),
            )
            try:
                write_document(self.storage, _path(key.id), key.model_dump(mode="json"), if_absent=True)
            except Conflict:
                continue  # the id is taken
            return key, f"gm_{key.id}_{secret}"

    def list(self) -> list[Key]:
        """All keys, also revoked ones, the oldest first."""
        documents = (read_document(self.storage, path)[0] for path in self.storage.list("keys/"))
        return sorted(map(Key.model_validate, documents), key=lambda key: (key.created, key.id))

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
                document, etag = read_document(self.storage, _path(id) if re.fullmatch(r"[0-9a-f]{8}", id) else "keys/-")
            except KeyNotFound:
                raise SpecError(f"no key {id[:40]!r}; `genmodels keys list` shows what there is") from None
            key = Key.model_validate(document)
            if key.revoked is None:
                key = key.model_copy(update={"revoked": now()})
                try:
                    write_document(self.storage, _path(id), key.model_dump(mode="json"), if_match=etag)
                except Conflict:
                    continue
            self._remember(id, key)
            return key

    def delete(self, id: str) -> None:
        """Remove every trace of a key."""
        self.storage.delete(_path(id))
        self._remember(id, None)

    def check(self, token: str) -> Key | None:
        """The key that a token belongs to, if it is one that works.

        Raises:
            StorageUnavailable: the store is away, and the key has not been seen lately.
        """
        match = re.fullmatch(TOKEN, token)
        if match is None:
            return None
        key = self._find(match[1])
        # Also where there is no such key, so that both take the same time.
        same = hmac.compare_digest(_digest(match[2]), key.sha256 if key else "0" * 64)
        return key if key and same and key.revoked is None else None

    def _find(self, id: str) -> Key | None:
        with self._lock:
            read, key = self._cache.get(id, (-STALE_SECONDS, None))
        age = time.monotonic() - read
        if age < FRESH_SECONDS:
            return key
        try:
            key = Key.model_validate(read_document(self.storage, _path(id))[0])
        except KeyNotFound:
            key = None
        except StorageUnavailable:
            if key and age < STALE_SECONDS:
                return key
            raise
        self._remember(id, key)
        return key

    def _remember(self, id: str, key: Key | None) -> None:
        with self._lock:
            self._cache[id] = time.monotonic(), key
            self._cache.move_to_end(id)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)


def _path(id: str) -> str:
    return f"keys/{id}.json"


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
