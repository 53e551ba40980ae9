"""A model host: load models for requests, keep them in memory, and answer requests to them.

A host follows the registry's catalogue, so new versions and moved aliases need no notification and no restart of a
replica. At its start it reads the catalogue and loads pinned models only, whatever the number of models is.
Errors of requests are returned as values: Serve would log an exception with its traceback.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch

from genmodels.engine import history
from genmodels.engine.alias_watcher import AliasWatcher
from genmodels.engine.evaluation_metrics import EvaluationMetrics
from genmodels.engine.history import History
from genmodels.engine.image import answers
from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.image.requests import ImageRequest
from genmodels.engine.model import Contract
from genmodels.engine.model_cache import ModelCache
from genmodels.engine.pins import Pin, Pins
from genmodels.engine.text import completion as text
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.completion import Vocabulary
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import GenmodelsError, RequestError, StorageUnavailable
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.store import Registry
from genmodels.runs.thinning import ThinnedHistories
from genmodels.sizing.memory import SERVED_ROWS
from genmodels.sizing.placement import DType, Placement
from genmodels.storage import open_storage
from genmodels.threads import Rounds
from services.gateway.catalog import Catalog, CatalogEntry
from services.gateway.deltas import DeltaQueue
from services.gateway.models import Models, as_request_error, in_thread
from services.gateway.pool_config import DEFAULT

WATCH_SECONDS = 1.0  # between two reads of the catalogue
SMALL_SHARE = 32  # parts of the memory, of which a model with more slots takes one: many models stay in memory
LOADERS = 4  # models that load at the same time
COLLECT_SECONDS = 0.05  # of text that is sent as one delta: a hop between processes takes about the time of a token

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class CompletionStarted:
    """The first item of a completion: the request was accepted."""

    model: str
    family: str
    seed: int | list[int]
    prompt_tokens: int


class ModelHost:
    """Answer requests to all versions of the registry and to checkpoints of runs.

    Args:
        memory: bytes of models; the least requested model is unloaded first. Default: see `Placement.budget`.
        workers: image requests that are computed at the same time; requests to one model share batches.
        torch_threads: of each computation.
        device: `cpu`, `cuda` or `cuda:<index>`, where the models compute.
        dtype: of the models there: `float32`, `bfloat16` or, on a GPU, `float16`.
        slots: texts in one decoding step, or images in one forward pass, of each model. Default: 16, and for a text
            model up to 64, if it then takes at most SMALL_SHARE of the memory.
        pin: models that are loaded before the first request and stay in memory: their names, or how many of the newest.
        pool: its name; the newest models are those of this pool.

    Raises:
        SpecError: this machine has no such device, or the device no such dtype or not so much memory.
    """

    def __init__(
        self,
        storage_url: str,
        *,
        memory: int | None = None,
        workers: int = 4,
        torch_threads: int = 1,
        device: str = "cpu",
        dtype: DType = "float32",
        slots: int | None = None,
        pin: Pin = 0,
        pool: str = DEFAULT,
    ) -> None:
        self._placement = Placement(device, dtype, slots or SERVED_ROWS)
        budget = self._placement.budget(memory)
        if slots is None:
            self._placement = replace(self._placement, small=budget // SMALL_SHARE)
        self._placement.prepare()
        torch.set_num_threads(torch_threads)
        self._workers, self._lookups, loaders = (  # names are resolved while all workers compute or all loaders wait
            ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(torch_threads,))
            for count, name in ((workers, "model"), (4, "registry"), (LOADERS, "load"))
        )
        self._registry = Registry(open_storage(storage_url, in_use=True))
        storage = self._registry.storage
        self.catalogue = catalogue = CatalogueReader(storage)
        self._cache = ModelCache(storage, budget, lambda model: model.start(torch_threads), loaders, self._placement)
        self._rounds = Rounds("alias-watcher", logger, lasting=True)
        self._watcher = AliasWatcher(storage, catalogue, self._cache, self._rounds)
        self._pins = Pins(catalogue, self._watcher, self._cache, pin, pool, budget)
        self._evaluation_metrics = EvaluationMetrics(catalogue)
        self._history_readers = ThreadPoolExecutor(2, "history")  # the history of a long run takes long to read
        self._histories = ThinnedHistories()
        self._models = Models(self._watcher, self._cache, self._lookups, 3 * max(slots or SERVED_ROWS, workers) // 2)
        self._catalog = Catalog(self._registry, self._watcher, self._models, self._lookups, catalogue)
        self.watch()
        while loads := list(self._pins.loads.values()):
            wait(loads)
        self.watch()  # the pinned models are kept from now on
        threading.Thread(target=_watch, args=(weakref.ref(self),), name="alias-watcher", daemon=True).start()

    def watch(self) -> None:
        """Read the catalogue, and start to load what it needs. An error of one model does not affect the others."""
        with self._rounds.round():
            try:
                self._pins.refresh(self._watcher.refresh())
                self._evaluation_metrics.update(self._watcher.serving())
            except StorageUnavailable as error:  # the current versions keep serving
                logger.warning("the registry cannot be read: %s", error)

    async def health(self) -> str | None:
        """Return None if this host is healthy, else the reason: its versions may be out of date."""
        return self._rounds.stalled()

    def check_health(self) -> None:
        """Raise RuntimeError, so that Serve replaces this replica.

        That is where only a new process helps: the registry's thread hangs or has ended, or the device is lost.
        """
        if self._rounds.stuck():
            raise RuntimeError(self._rounds.stalled())
        self._placement.check_device()

    async def model(self, name: str) -> CatalogEntry | RequestError:
        try:
            return await self._catalog.get(name, await self._models.resolve(name))
        except GenmodelsError as error:
            return as_request_error(error)

    async def contract(self, name: str) -> Contract | RequestError:
        try:
            async with self._models.acquire(name) as model:
                return model.contract
        except GenmodelsError as error:
            return as_request_error(error)

    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError:
        try:
            async with self._models.acquire(name) as model:
                return await in_thread(self._workers, answers.answer, model, request)
        except GenmodelsError as error:
            return as_request_error(error)

    async def vocabulary(self, name: str) -> Vocabulary | RequestError:
        try:
            async with self._models.acquire(name) as model:
                return await in_thread(self._lookups, text.vocabulary, model)
        except GenmodelsError as error:
            return as_request_error(error)

    async def history(self, name: str, points: int = history.MAX_ROWS) -> History | RequestError:
        try:
            resolved = await self._models.resolve(name)
            read = history.reader(self._registry.storage, self._histories, resolved, points)
            while (answer := await in_thread(self._history_readers, read)) is None:
                continue
            return answer
        except GenmodelsError as error:
            return as_request_error(error)

    async def sample(self, name: str, step: int, file: str) -> bytes | RequestError:
        try:
            resolved = await self._models.resolve(name)
            return await in_thread(
                self._history_readers, history.read_sample, self._registry.storage, resolved, step, file
            )
        except GenmodelsError as error:
            return as_request_error(error)

    async def complete(
        self, name: str, request: CompletionRequest
    ) -> AsyncGenerator[CompletionStarted | TextDelta | RequestError, None]:
        """Yield one `CompletionStarted`, then deltas; a `RequestError` may replace any item and is then the last."""
        started, completion = time.monotonic(), None
        try:
            async with self._models.acquire(name) as model:
                completion = text.complete(model, request)
                queue = DeltaQueue()
                completion.start(queue.put, started)
                family = model.family.family_name()
                yield CompletionStarted(completion.model, family, completion.seed, completion.prompt_tokens)
                unfinished = request.choices
                while unfinished:
                    for delta in await queue.get():  # the first one at once, later ones every COLLECT_SECONDS
                        unfinished -= delta.finish_reason is not None
                        yield delta
                    if unfinished:
                        await queue.collect(COLLECT_SECONDS)
        except GenmodelsError as error:
            yield as_request_error(error)
        finally:
            if completion is not None:  # the client may have disconnected
                completion.cancel()


def _watch(host: weakref.ref[ModelHost]) -> None:
    """Watch the registry until the host is garbage collected."""
    while True:
        time.sleep(WATCH_SECONDS)
        alive = host()
        if alive is None:
            return
        alive.watch()
        del alive
