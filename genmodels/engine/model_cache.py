"""The models in memory, within a budget of bytes: the least recently used model that is idle is unloaded first."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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

logger = logging.getLogger("genmodels.serving")


@dataclass
class _CacheEntry:
    model: LoadedModel
    size: int  # bytes
    uses: int = 0
    unload_when_idle: bool = False


class ModelCache:
    """Loaded models by their exact names; thread-safe.

    Args:
        budget: bytes.
        start: called once with each loaded model, before its first request.
        placement: of the models; the budget is of its device's memory.
    """

    def __init__(
        self,
        storage: Storage,
        budget: int,
        start: Callable[[LoadedModel], None],
        placement: Placement = DEFAULT_PLACEMENT,
    ) -> None:
        self._storage, self._budget, self._start, self._placement = storage, budget, start, placement
        self._entries: OrderedDict[str, _CacheEntry] = OrderedDict()  # the least recently used first
        self._loading: dict[str, Future[None]] = {}
        self._reserved = 0  # bytes of the models that are being loaded
        self._failures: OrderedDict[str, tuple[float, GenmodelsError]] = OrderedDict()  # (retry time, reason) by name
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def acquire(self, name: str) -> Iterator[LoadedModel]:
        """Yield a model and keep it in memory during the context.

        Raises:
            KeyError: the model is not in memory.
        """
        with self._lock:
            entry = self._entries[name]
            self._entries.move_to_end(name)
            entry.uses += 1
        try:
            yield entry.model
        finally:
            with self._lock:
                entry.uses -= 1
                if entry.unload_when_idle and not entry.uses and self._entries.get(name) is entry:
                    self._unload(name)

    def load(self, resolved: ResolvedModel) -> None:
        """Load a model if it is not in memory. Concurrent calls for one model wait for the same load.

        Raises:
            CheckpointError: the model is damaged, or larger than the budget.
            UnexpectedFailure: another error, of this machine or of the code.
            RequestError: all models in memory are in use.
        """
        with self._lock:
            if entry := self._entries.get(resolved.name):
                entry.unload_when_idle = False
                return
            if (failure := self._failures.get(resolved.name)) and time.monotonic() < failure[0]:
                raise failure[1]
            loading = self._loading.get(resolved.name)
            if is_first := loading is None:
                loading = self._loading[resolved.name] = Future()
        assert loading is not None
        if is_first:
            self._load_for_all(resolved, loading)
        loading.result()

    def unload_when_idle(self, name: str) -> None:
        """Unload a model after its last request in progress; no alias points to it any more."""
        with self._lock:
            if entry := self._entries.get(name):
                entry.unload_when_idle = True
                if not entry.uses:
                    self._unload(name)

    def _load_for_all(self, resolved: ResolvedModel, loading: Future[None]) -> None:
        """Load a model and give the result to all threads that wait for it."""
        try:
            self._load(resolved)
        except BaseException as raised:
            error = load_error(raised, self._placement.device) if isinstance(raised, Exception) else raised
            if isinstance(error, (CheckpointError, UnexpectedFailure)):
                logger.debug("%s was not loaded", resolved.name, exc_info=raised)
                seconds = FAILURE_TTL_SECONDS if isinstance(error, CheckpointError) else RETRY_SECONDS
                with self._lock:
                    self._failures[resolved.name] = time.monotonic() + seconds, error
                    while len(self._failures) > MAX_FAILURES:
                        self._failures.popitem(last=False)
            self._loading.pop(resolved.name)
            loading.set_exception(error)
        else:
            self._loading.pop(resolved.name)
            loading.set_result(None)

    def _load(self, resolved: ResolvedModel) -> None:
        started = time.monotonic()
        size = self._footprint(resolved)
        peak = max(size.total, size.weights + resolved.size)  # files are read while the networks are in memory
        with self._reserve(min(peak, self._budget)):
            model = load(self._storage, resolved, self._placement)
            warm_up(model)
            LOAD_SECONDS.labels(resolved.family).observe(time.monotonic() - started)
            model.enable_metrics()
            self._start(model)  # before requests can use it: a model that cannot start would never answer them
            with self._lock:
                LOADED_BYTES.labels(*model.labels).inc(size.total)
                self._entries[resolved.name] = _CacheEntry(model, size.total)

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
        with self._lock:
            idle = [name for name, entry in self._entries.items() if not entry.uses]
            while sum(entry.size for entry in self._entries.values()) + self._reserved + size > self._budget:
                if not idle:
                    message = "all models in memory are in use, and there is no room for another; try again in a moment"
                    raise RequestError(message, param="model", status=503, code="memory_full")
                self._unload(idle.pop(0))
            self._reserved += size
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= size

    def _unload(self, name: str) -> None:
        entry = self._entries.pop(name)
        LOADED_BYTES.labels(*entry.model.labels).dec(entry.size)
        entry.model.close()


def _too_large(size: int, budget: int) -> CheckpointError:
    return CheckpointError(f"it takes {size / 2**20:,.1f} MiB of memory, and the budget is {budget / 2**20:,.1f} MiB")
