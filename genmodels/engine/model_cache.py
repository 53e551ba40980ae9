"""The models in memory, within a budget of bytes.

A load makes room by unloading models, but none that is in use, kept, or new. A new model stays at least as long as its
own load took. So a host spends at most about half of its time on loading into the same memory, also if requests
alternate between two models that do not fit together: the load of one waits while the other answers.

The model with the fewest requests is unloaded first, where a new model begins at the rank of the last unloaded one (LFU
with dynamic aging, Arlitt et al., 2000, https://doi.org/10.1145/362883.362920). So a model that is requested all the
time outlives many that are requested once, and one that was popular in the past does not stay for ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from genmodels.engine.device_errors import load_error
from genmodels.engine.loader import footprint, load
from genmodels.engine.model import LoadedModel
from genmodels.engine.warmup import warm_up
from genmodels.errors import CheckpointError, GenmodelsError, RequestError, UnexpectedFailure
from genmodels.metrics import LOAD_SECONDS, LOADED_BYTES
from genmodels.registry.references import ResolvedModel
from genmodels.sizing.memory import Footprint
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement
from genmodels.storage import Storage

FAILURE_TTL_SECONDS = 60.0  # a model that failed to load is not tried again for so long
RETRY_SECONDS = 5.0  # the same, if this machine may be the cause: a full disk, no memory
MAX_FAILURES = 1024  # remembered
MIN_STAY, MAX_STAY = 0.5, 30.0  # seconds that a new model stays: its requests must come in, and others must not starve
ROOM_SECONDS = 60.0  # that a load waits for room
MAX_LOADING = 64  # models that load or wait for it; a client may name more
MEMORY_FULL, MEMORY_KEPT = "memory_full", "memory_kept"  # codes of errors: no room now; none next to kept models

logger = logging.getLogger("genmodels.serving")


@dataclass
class _CacheEntry:
    model: LoadedModel
    size: int  # bytes
    stays_until: float  # monotonic time
    rank: int  # the model with the lowest one is unloaded first
    requests: int = 0
    uses: int = 0  # requests in progress
    keepers: int = 0
    unload_when_idle: bool = False


class ModelCache:
    """Loaded models by their exact names; thread-safe.

    Args:
        budget: bytes.
        start: called once with each loaded model, before its first request.
        loaders: threads that load: as many models load at the same time.
        placement: of the models; the budget is of its device's memory.
    """

    def __init__(
        self,
        storage: Storage,
        budget: int,
        start: Callable[[LoadedModel], None],
        loaders: ThreadPoolExecutor,
        placement: Placement = DEFAULT_PLACEMENT,
    ) -> None:
        self._storage, self._budget, self._start = storage, budget, start
        self._loaders, self._placement = loaders, placement
        self._entries: dict[str, _CacheEntry] = {}
        self._age = 0  # rank of the last model that was unloaded to make room
        self._loading: dict[str, Future[None]] = {}
        self._reserved = 0  # bytes of the models that are being loaded
        self._failures: OrderedDict[str, tuple[float, GenmodelsError]] = OrderedDict()  # (retry time, reason) by name
        self._room = threading.Condition(threading.RLock())  # notified when there may be more room

    @contextlib.contextmanager
    def acquire(self, name: str) -> Iterator[LoadedModel]:
        """Yield a model and keep it in memory during the context.

        Raises:
            KeyError: the model is not in memory.
        """
        with self._room:
            entry = self._entries[name]
            entry.uses += 1
            entry.requests += 1
            entry.rank = self._age + entry.requests
        try:
            yield entry.model
        finally:
            with self._room:
                entry.uses -= 1
                self._released(name, entry)

    @contextlib.contextmanager
    def keep(self, name: str) -> Iterator[None]:
        """Keep a model in memory during the context, without using it.

        Raises:
            KeyError: the model is not in memory.
        """
        with self._room:
            entry = self._entries[name]
            entry.keepers += 1
        try:
            yield
        finally:
            with self._room:
                entry.keepers -= 1
                self._released(name, entry)

    def names(self) -> set[str]:
        """Return the models that are in memory or are being loaded."""
        with self._room:
            return {*self._entries, *self._loading}

    def load(self, resolved: ResolvedModel) -> Future[None]:
        """Load a model if it is not in memory, and return at once. All calls for one model share one load.

        The result raises:
            CheckpointError: the model is damaged, or larger than the budget.
            UnexpectedFailure: another error, of this machine or of the code.
            RequestError: there is no room, or too many models are being loaded.
        """
        name = resolved.name
        with self._room:
            if entry := self._entries.get(name):
                entry.unload_when_idle = False
                return _ended(None)
            if loading := self._loading.get(name):
                return loading
            if (failure := self._failures.get(name)) and time.monotonic() < failure[0]:
                return _ended(_without_frames(failure[1]))
            if len(self._loading) >= MAX_LOADING:
                message = "too many models are being loaded; try again in a moment"
                return _ended(RequestError(message, param="model", status=503, code="model_loading", retry_after=5))
            loading = self._loading[name] = Future()
            loading.set_running_or_notify_cancel()  # a client that waits for it cannot cancel it for the others
        self._loaders.submit(self._load_for_all, resolved, loading)
        return loading

    def unload_when_idle(self, name: str) -> None:
        """Unload a model after its last request in progress; no alias points to it any more."""
        with self._room:
            if entry := self._entries.get(name):
                entry.unload_when_idle = True
                self._released(name, entry)

    def _released(self, name: str, entry: _CacheEntry) -> None:
        if entry.uses or entry.keepers:
            return
        if entry.unload_when_idle and self._entries.get(name) is entry:
            self._unload(name)
        self._room.notify_all()

    def _load_for_all(self, resolved: ResolvedModel, loading: Future[None]) -> None:
        """Load a model and give the result to all that wait for it."""
        error: BaseException | None = None
        try:
            self._load(resolved)
        except BaseException as raised:
            error = raised
            if isinstance(raised, Exception):
                logger.debug("%s was not loaded", resolved.name, exc_info=raised)
                error = _without_frames(load_error(raised, self._placement.device))
            if isinstance(error, (CheckpointError, UnexpectedFailure)):
                self._remember_failure(resolved.name, error)
        with self._room:
            self._loading.pop(resolved.name)
        if error:
            loading.set_exception(error)
        else:
            loading.set_result(None)

    def _remember_failure(self, name: str, error: GenmodelsError) -> None:
        seconds = FAILURE_TTL_SECONDS if isinstance(error, CheckpointError) else RETRY_SECONDS
        with self._room:
            self._failures[name] = time.monotonic() + seconds, error
            while len(self._failures) > MAX_FAILURES:
                self._failures.popitem(last=False)

    def _load(self, resolved: ResolvedModel) -> None:
        size = self._footprint(resolved)
        peak = max(size.total, size.weights + resolved.size)  # files are read while the networks are in memory
        with self._reserve(min(peak, self._budget)):
            started = time.monotonic()
            model = load(self._storage, resolved, self._placement)
            warm_up(model)
            seconds = time.monotonic() - started
            LOAD_SECONDS.labels(resolved.family).observe(seconds)
            model.enable_metrics()
            self._start(model)  # before requests can use it: a model that cannot start would never answer them
            with self._room:
                LOADED_BYTES.labels(*model.labels).inc(size.total)
                stays_until = time.monotonic() + min(max(seconds, MIN_STAY), MAX_STAY)
                self._entries[resolved.name] = _CacheEntry(model, size.total, stays_until, self._age)

    def _footprint(self, resolved: ResolvedModel) -> Footprint:
        """Return the memory that a model will take, and check it against the budget before anything is loaded."""
        if resolved.size > self._budget:
            raise _too_large(resolved.size, self._budget)
        size = footprint(self._storage, resolved, self._placement)
        if size.total > self._budget:
            raise _too_large(size.total, self._budget)
        return size

    @contextlib.contextmanager
    def _reserve(self, size: int) -> Iterator[None]:
        """Keep `size` bytes of the budget free during the context."""
        with self._room:
            self._make_room(size)
            self._reserved += size
        try:
            yield
        finally:
            with self._room:
                self._reserved -= size
                self._room.notify_all()

    def _make_room(self, size: int) -> None:
        """Unload models until `size` bytes are free; wait while that is impossible."""
        deadline = time.monotonic() + ROOM_SECONDS
        while not self._unload_for(size):
            if size > self._budget - self._kept():
                raise _no_room("the models that this host keeps in memory leave no room for it", MEMORY_KEPT)
            if (now := time.monotonic()) >= deadline:
                raise _no_room("all models in memory are in use, and there is no room for another", MEMORY_FULL)
            stays = (entry.stays_until for entry in self._entries.values() if entry.stays_until > now)
            self._room.wait(min([deadline, *stays]) - now)

    def _unload_for(self, size: int) -> bool:
        """Unload as many models as must go to free `size` bytes; none, and return False, if these are too few."""
        missing = sum(entry.size for entry in self._entries.values()) + self._reserved + size - self._budget
        now, victims = time.monotonic(), []
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1].rank):
            if missing <= 0:
                break
            if not entry.uses and not entry.keepers and entry.stays_until <= now:
                victims.append(name)
                missing -= entry.size
        if missing > 0:
            return False
        for name in victims:
            self._age = max(self._age, self._entries[name].rank)
            self._unload(name)
        return True

    def _kept(self) -> int:
        return sum(entry.size for entry in self._entries.values() if entry.keepers)

    def _unload(self, name: str) -> None:
        entry = self._entries.pop(name)
        LOADED_BYTES.labels(*entry.model.labels).dec(entry.size)
        entry.model.close()


def _ended(error: GenmodelsError | None) -> Future[None]:
    future: Future[None] = Future()
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


def _without_frames(error: GenmodelsError) -> GenmodelsError:
    """Remove what led to an error: its frames hold the model that failed, and those of each request that gets it."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _no_room(reason: str, code: str) -> RequestError:
    message = f"{reason}; try again in a moment"
    return RequestError(message, param="model", status=503, code=code, retry_after=5)


def _too_large(size: int, budget: int) -> CheckpointError:
    return CheckpointError(f"it takes {size / 2**20:,.1f} MiB of memory, and the budget is {budget / 2**20:,.1f} MiB")
