"""Who may do what: a bearer key, its scopes, and the models that it may use."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from genmodels.errors import GenmodelsError, RequestError, StorageUnavailable
from genmodels.keys import Key, Keys, Scope
from genmodels.storage import Storage
from services.http.middleware import ANSWER_HEADERS
from services.http.rate_limits import Limits, Slots

LOOKUPS = 4  # threads that look keys up
MAX_WAITING = 64  # lookups of tokens that are new to us; a flood of invented ones is refused, and reaches nobody else
KNOWN = 4096
RECHECK_SECONDS = 3.0  # between two looks at a key whose answer takes long

_BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="gm_..., made by `genmodels keys create`")


@dataclass
class Caller:
    """Who asks; without keys (`--no-auth`) anyone, who may do anything."""

    key: Key | None = None
    look: Callable[[], Awaitable[Key | None]] | None = None  # at the key once more
    looked: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return self.key.id if self.key else ""

    @property
    def reason(self) -> str:
        """For a run's history: by whom a thing was done."""
        return f"by key {self.key.name!r}" if self.key else "by hand"

    async def recheck(self) -> None:
        """Called time and again while a long answer is sent. Raise RequestError (401) if the key has been revoked."""
        if self.look is None or time.monotonic() - self.looked < RECHECK_SECONDS:
            return
        self.looked = time.monotonic()
        with contextlib.suppress(StorageUnavailable):  # the next look will tell
            if await self.look() is None:
                raise RequestError("this key was revoked in the middle of the answer", status=401, code="wrong_key")

    def may_use(self, models: Iterable[str]) -> bool:
        """Whether all of these models are this key's; each may carry `@version`."""
        return self.key is None or all(self.key.may_use(model.partition("@")[0]) for model in models)

    def require(self, models: Iterable[str]) -> None:
        """Raise RequestError (403) unless the key may use all of these models."""
        if self.key is None:
            return
        for model in models:
            if not self.may_use([model]):
                prefixes = ", ".join(f"{prefix}..." for prefix in self.key.prefixes)
                message = f"this key is limited to models named {prefixes}, and {model[:100]!r} is not among them"
                raise RequestError(message, status=403, param="model", code="not_this_keys_model")

    def require_job(self, models: Iterable[str]) -> None:
        """As `need`, for models that the caller has not named: they are not told."""
        if not self.may_use(models):
            message = "this key is limited to some models, and this job trains others"
            raise RequestError(message, status=403, param="job", code="not_this_keys_model")

    def require_all_models(self) -> None:
        """Raise RequestError (403) for a key that is limited to some models."""
        if self.key and self.key.prefixes:
            raise RequestError("this key is limited to some models, and this is about all", status=403, code="limited")


def require_keys(storage: Storage) -> Keys:
    """The keys in a storage.

    Raises:
        GenmodelsError: there is none that works, so that nobody could use what asks for one.
    """
    keys = Keys(storage)
    if keys.any():
        return keys
    raise GenmodelsError(
        f"{storage.url} holds no key yet, and without one nobody could ask. Make one: "
        f"genmodels keys create NAME --storage {storage.url} - or ask for none, on this machine alone: "
        "--no-auth"
    )


class KeyAuth:
    """Makes FastAPI dependencies: `guard("submit")` gives the Caller, or answers 401 or 403.

    Args:
        keys: None for `--no-auth`: everyone may do everything.
        limits: how much each key may ask, by what it says; None: any number.
        slots: how much any key may ask at once; None: any number.
    """

    def __init__(self, keys: Keys | None, limits: Limits | None = None, slots: Slots | None = None) -> None:
        self._keys, self._limits, self._slots = keys, limits, slots
        self._known: OrderedDict[bytes, None] = OrderedDict()  # digests of tokens that were right before
        self._lane, self._lane_of_strangers = (ThreadPoolExecutor(LOOKUPS, "keys") for _ in range(2))
        self._strangers = 0

    def __call__(self, *scopes: Scope) -> Any:
        """A dependency on a key that has one of these scopes."""
        if self._keys is None:
            return Depends(_anyone)
        keys = self._keys

        async def admit(
            request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
        ) -> AsyncIterator[Caller]:
            if credentials is None:
                message = "no key; send the header `Authorization: Bearer gm_...` (`genmodels keys create` makes a key)"
                raise RequestError(message, status=401, code="no_key")
            key = await self._find(keys, credentials.credentials)
            if key is None:
                raise RequestError("this key is not known, or it was revoked", status=401, code="wrong_key")
            if not any(key.allows(scope) for scope in scopes):
                message = f"this key has the scope {', '.join(key.scopes)}, and this needs {' or '.join(scopes)}"
                raise RequestError(message, status=403, code="scope")
            with contextlib.ExitStack() as leaving:
                if self._slots is not None:
                    leaving.enter_context(self._slots.take(key.id))
                if self._limits is not None:
                    request.scope.get(ANSWER_HEADERS, {}).update(self._limits.enter(key))
                    leaving.callback(self._limits.leave, key)
                yield Caller(key, lambda: self._find(keys, credentials.credentials))

        return Security(admit, scopes=scopes)

    async def _find(self, keys: Keys, token: str) -> Key | None:
        """The key of a token. Those who were right before do not wait behind those who guess."""
        digest, loop = hashlib.sha256(token.encode()).digest(), asyncio.get_running_loop()
        if digest in self._known:
            return await loop.run_in_executor(self._lane, keys.check, token)
        if self._strangers >= MAX_WAITING:
            raise RequestError("too many new keys at once; try again in a moment", status=429, code="too_many")
        self._strangers += 1
        try:
            key = await loop.run_in_executor(self._lane_of_strangers, keys.check, token)
        finally:
            self._strangers -= 1
        if key:
            self._known[digest] = None
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
        return key


async def _anyone() -> Caller:
    return Caller()
