"""Authorization: bearer keys, their scopes, and the models that they may use."""

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

from genmodels.data import DATASETS
from genmodels.errors import GenmodelsError, RequestError, StorageUnavailable
from genmodels.keys import Key, Keys, Scope
from genmodels.storage import Storage
from services.http.middleware import ANSWER_HEADERS
from services.http.rate_limits import Limits, Slots

LOOKUPS = 4  # threads that look keys up
MAX_WAITING = 64  # lookups of unknown keys; a flood of invented keys is refused, and delays no known key
MAX_KNOWN = 4096  # keys that were valid before
RECHECK_SECONDS = 3.0  # between two checks of a key during a long answer

_BEARER = HTTPBearer(auto_error=False, scheme_name="key", description="gm_..., made by `genmodels keys create`")


@dataclass
class Caller:
    """The sender of a request. Without keys (`--no-auth`), every caller may do everything.

    A key that is limited to prefixes sees and uses the models and the datasets whose names begin with one of them, the
    built-in datasets, and the jobs that train only such models. Of a job that also trains other models it sees only the
    id, where the job has trained one of the key's models: the id is a part of the names of that model's checkpoints.
    """

    key: Key | None = None
    check: Callable[[], Awaitable[Key | None]] | None = None  # reads the key again
    checked: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return self.key.id if self.key else ""

    @property
    def reason(self) -> str:
        """Return the origin of a command, for a run's history."""
        return f"by key {self.key.name!r}" if self.key else "by hand"

    async def recheck(self) -> None:
        """Raise RequestError (401) if the key has been revoked; called repeatedly during a long answer."""
        if self.check is None or time.monotonic() - self.checked < RECHECK_SECONDS:
            return
        self.checked = time.monotonic()
        with contextlib.suppress(StorageUnavailable):  # the next check decides
            if await self.check() is None:
                raise RequestError("this key was revoked during the answer", status=401, code="wrong_key")

    def may_use(self, models: Iterable[str]) -> bool:
        """Return True if the key may use all of these models; names may end with `@version`."""
        return self.key is None or all(self.key.may_use(model.partition("@")[0]) for model in models)

    def may_see_run(self, run: str) -> bool:
        """Return True if the key may use the model of a run `job/model`."""
        return self.may_use([run.partition("/")[2]])

    def may_use_dataset(self, name: str) -> bool:
        """Return True if the key may train on this dataset."""
        return name in DATASETS or self.may_use([name])

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
        """Raise RequestError (403) unless the key may use all models of a job; the message does not name the models."""
        if not self.may_use(models):
            message = "this key is limited to some models, and this job trains others"
            raise RequestError(message, status=403, param="job", code="not_this_keys_model")

    def require_all_models(self) -> None:
        """Raise RequestError (403) for a key that is limited to some models."""
        if self.key and self.key.prefixes:
            raise RequestError(
                "this key is limited to some models, and this request concerns all models", status=403, code="limited"
            )


def require_keys(storage: Storage) -> Keys:
    """Return the keys of a storage.

    Raises:
        GenmodelsError: the storage has no valid key, so no client could use the service.
    """
    keys = Keys(storage)
    if keys.any():
        return keys
    raise GenmodelsError(
        f"{storage.url} has no key yet, so no client could use the service. Create one: "
        f"genmodels keys create NAME --storage {storage.url}. For this machine only, keys can be turned off: "
        "--no-auth"
    )


class KeyAuth:
    """Create FastAPI dependencies: `auth("submit")` returns the Caller, or answers 401 or 403.

    Args:
        keys: None for `--no-auth`: every caller may do everything.
        limits: enforces the rate and concurrency that a key states; None: no limit.
        slots: bounds the concurrent requests, in all and of each key; None: no limit.
    """

    def __init__(self, keys: Keys | None, limits: Limits | None = None, slots: Slots | None = None) -> None:
        self._keys, self._limits, self._slots = keys, limits, slots
        self._known: OrderedDict[bytes, None] = OrderedDict()  # digests of keys that were valid before
        self._threads_for_known, self._threads_for_unknown = (ThreadPoolExecutor(LOOKUPS, "keys") for _ in range(2))
        self._unknown = 0

    def __call__(self, *scopes: Scope) -> Any:
        """Return a dependency on a key that has one of these scopes."""
        if self._keys is None:
            return Depends(_anyone)
        keys = self._keys

        async def admit(
            request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
        ) -> AsyncIterator[Caller]:
            if credentials is None:
                message = "no key; send the header `Authorization: Bearer gm_...` (`genmodels keys create` makes a key)"
                raise RequestError(message, status=401, code="no_key")
            key = await self._lookup(keys, credentials.credentials)
            if key is None:
                raise RequestError("this key is unknown or was revoked", status=401, code="wrong_key")
            if not any(key.allows(scope) for scope in scopes):
                message = (
                    f"this key has the scope {', '.join(key.scopes)}, but this request needs {' or '.join(scopes)}"
                )
                raise RequestError(message, status=403, code="scope")
            with contextlib.ExitStack() as stack:
                if self._slots is not None:
                    stack.enter_context(self._slots.take(key.id))
                if self._limits is not None:
                    request.scope.get(ANSWER_HEADERS, {}).update(self._limits.enter(key))
                    stack.callback(self._limits.leave, key)
                yield Caller(key, lambda: self._lookup(keys, credentials.credentials))

        return Security(admit, scopes=scopes)

    async def _lookup(self, keys: Keys, token: str) -> Key | None:
        """Return the key of a token. Keys that were valid before do not wait behind guessed ones."""
        digest, loop = hashlib.sha256(token.encode()).digest(), asyncio.get_running_loop()
        if digest in self._known:
            return await loop.run_in_executor(self._threads_for_known, keys.check, token)
        if self._unknown >= MAX_WAITING:
            raise RequestError("too many unknown keys at once; try again in a moment", status=429, code="too_many")
        self._unknown += 1
        try:
            key = await loop.run_in_executor(self._threads_for_unknown, keys.check, token)
        finally:
            self._unknown -= 1
        if key:
            self._known[digest] = None
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return key


async def _anyone() -> Caller:
    return Caller()
