"""The models in memory, within a budget of bytes: the one not asked for the longest goes first, never one in use."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from genmodels.engine.loader import footprint, load
from genmodels.engine.model import Loaded
from genmodels.engine.warmup import warm
from genmodels.errors import CheckpointError, GenmodelsError, RequestError, UnexpectedFailure, contained
from genmodels.metrics import LOAD_SECONDS, LOADED_BYTES
from genmodels.registry.references import ResolvedModel
from genmodels.sizing.memory import Footprint
from genmodels.storage import Storage

REFUSED_SECONDS = 60.0  # how long one that could not be loaded is not tried again
RETRY_SECONDS = 5.0  # the same, where this machine may be at fault: a full disk, no memory
REFUSED_KNOWN = 1024

logger = logging.getLogger("genmodels.serving")


@dataclass
class _Held:
    loaded: Loaded
    size: int  # bytes
    uses: int = 0
    leaves: bool = False  # when nobody uses it any more


class Shelf:
    """Loaded models by their exact names; safe between threads.

    Args:
        budget: bytes.
        start: called once with each model that has got its place, before any request.
    """

    def __init__(self, storage: Storage, budget: int, start: Callable[[Loaded], None]) -> None:
        self._storage, self._budget, self._start = storage, budget, start
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._loading: dict[str, Future[None]] = {}
        self._coming = 0  # bytes of what is being loaded, as far as known
        self._refused: OrderedDict[str, tuple[float, GenmodelsError]] = OrderedDict()  # until when, and why
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Loaded]:
        """A model that stays in memory as long as this lasts.

        Raises:
            KeyError: it is not in memory.
        """
        with self._lock:
            held = self._held[name]
            self._held.move_to_end(name)
            held.uses += 1
        try:
            yield held.loaded
        finally:
            with self._lock:
                held.uses -= 1
                if held.leaves and not held.uses and self._held.get(name) is held:
                    self._drop(name)

    def bring(self, found: ResolvedModel) -> None:
        """Have a model in memory. Who asks for one that is being loaded waits for the same load.

        Raises:
            CheckpointError: it is damaged, or larger than the budget.
            UnexpectedFailure: anything else went wrong, on this machine or in the code.
            RequestError: all that is in memory is in use.
        """
        with self._lock:
            if held := self._held.get(found.name):
                held.leaves = False
                return
            if (refused := self._refused.get(found.name)) and time.monotonic() < refused[0]:
                raise refused[1]
            loading = self._loading.get(found.name)
            if mine := loading is None:
                loading = self._loading[found.name] = Future()
        assert loading is not None
        if mine:
            self._settle(found, loading)
        loading.result()

    def release(self, name: str) -> None:
        """Nothing means this model any more: it goes after its last request."""
        with self._lock:
            if held := self._held.get(name):
                held.leaves = True
                if not held.uses:
                    self._drop(name)

    def _settle(self, found: ResolvedModel, loading: Future[None]) -> None:
        try:
            self._bring(found)
        except BaseException as raised:
            error = contained(raised) if isinstance(raised, Exception) else raised
            if isinstance(error, (CheckpointError, UnexpectedFailure)):
                logger.debug("%s was not loaded", found.name, exc_info=raised)
                seconds = REFUSED_SECONDS if isinstance(error, CheckpointError) else RETRY_SECONDS
                with self._lock:
                    self._refused[found.name] = time.monotonic() + seconds, error
                    while len(self._refused) > REFUSED_KNOWN:
                        self._refused.popitem(last=False)
            self._loading.pop(found.name)
            loading.set_exception(error)
        else:
            self._loading.pop(found.name)
            loading.set_result(None)

    def _bring(self, found: ResolvedModel) -> None:
        began = time.monotonic()
        size = self._footprint(found)
        peak = max(size.total, size.weights + found.size)  # files are read while networks stand
        with self._room(min(peak, self._budget)):
            loaded = load(self._storage, found)
            warm(loaded)
            LOAD_SECONDS.labels(found.family).observe(time.monotonic() - began)
            loaded.meter()
            self._start(loaded)  # before requests can find it: they would wait for ever for one that cannot start
            with self._lock:
                LOADED_BYTES.labels(*loaded.labels).inc(size.total)
                self._held[found.name] = _Held(loaded, size.total)

    def _footprint(self, found: ResolvedModel) -> Footprint:
        """What a model will take, before any of it is taken."""
        if found.size > self._budget:
            raise _too_large(found.size, self._budget)
        size = footprint(self._storage, found)
        if size.total > self._budget:
            raise _too_large(size.total, self._budget)
        return size

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Room for so many bytes, while this lasts."""
        with self._lock:
            idle = [name for name, held in self._held.items() if not held.uses]
            while sum(held.size for held in self._held.values()) + self._coming + size > self._budget:
                if not idle:
                    message = "the memory for models is full of ones in use; try again in a moment"
                    raise RequestError(message, param="model", status=503, code="memory_full")
                self._drop(idle.pop(0))
            self._coming += size
        try:
            yield
        finally:
            with self._lock:
                self._coming -= size

    def _drop(self, name: str) -> None:
        held = self._held.pop(name)
        LOADED_BYTES.labels(*held.loaded.labels).dec(held.size)
        held.loaded.close()


def _too_large(size: int, budget: int) -> CheckpointError:
    return CheckpointError(f"it takes {size / 2**20:,.1f} MiB of memory, and the budget is {budget / 2**20:,.1f} MiB")
