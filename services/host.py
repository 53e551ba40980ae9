"""A pool's model host: loads versions from the registry and answers requests to them.

It follows the registry: a name is looked up again after RESOLVE_SECONDS, so that nobody needs telling of a moved alias.
What is wrong with a request comes back as a value; an exception Serve would log with its traceback.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import torch

from genmodels.engine import images, text
from genmodels.engine.images import ImageAnswer, ImageRequest
from genmodels.engine.loaded import ImageModel, Loaded, TextModel, load
from genmodels.engine.text import CompletionRequest, Piece
from genmodels.errors import GenmodelsError, ModelNotFound, RequestError, StorageUnavailable
from genmodels.registry import Registry, Version
from genmodels.storage import open_storage

RESOLVE_SECONDS = 1.0  # how long a name's version is believed
RESOLVE_ENTRIES = 1024
GATHER_SECONDS = 0.015  # of text that travels as one piece: each hop between processes costs about a token's time

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """A completion has been accepted."""

    model: str
    seed: int
    prompt_tokens: int


@dataclass(frozen=True)
class Entry:
    """A model as `GET /v1/models` shows it."""

    id: str
    version: Version
    aliases: dict[str, int]
    kind: str | None = None
    verbs: tuple[str, ...] = ()
    shape: dict[str, int | str] | None = None
    problem: str | None = None  # why it cannot be served


class ModelHost:
    """Serves any version of the registry.

    Args:
        max_loaded: versions kept in memory; the one that has not been asked for the longest goes first.
        workers: requests computed at the same time.
        torch_threads: of each computation.
    """

    def __init__(self, storage_url: str, *, max_loaded: int = 16, workers: int = 2, torch_threads: int = 1) -> None:
        torch.set_num_threads(torch_threads)
        self._registry = Registry(open_storage(storage_url))
        self._threads = ThreadPoolExecutor(
            workers, "model", initializer=torch.set_num_threads, initargs=(torch_threads,)
        )
        self._lookups = ThreadPoolExecutor(4, "registry")  # so that names are found while all workers compute
        self._max_loaded, self._torch_threads = max_loaded, torch_threads
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Loaded]] = {}
        self._entries: dict[str, Entry] = {}
        self._resolved: dict[str, tuple[float, Any]] = {}
        self._preload()

    async def models(self) -> list[Entry] | RequestError:
        """All models, each by what its bare name means, or by its newest version if that means nothing."""
        try:
            found = await self._believe("", self._list)
        except GenmodelsError as error:
            return _refusal(error)
        return [await self._describe(name, version, aliases) for name, version, aliases in found]

    async def model(self, name: str) -> Entry | RequestError:
        try:
            version = await self._resolve(name)
            aliases = await self._believe(f"{version.model}/aliases", lambda: _aliases(self._registry, version.model))
        except GenmodelsError as error:
            return _refusal(error)
        return await self._describe(name, version, aliases)

    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError:
        try:
            loaded = await self._load(await self._resolve(name))
            return await _in(self._threads, images.answer, loaded, request)
        except GenmodelsError as error:
            return _refusal(error)

    async def complete(self, name: str, request: CompletionRequest) -> AsyncIterator[Opened | Piece | RequestError]:
        """One `Opened`, then pieces; a `RequestError` at any place is the last item."""
        completion = None
        try:
            loaded = await self._load(await self._resolve(name))
            completion = text.complete(loaded, request)
            inbox = Inbox()
            completion.start(inbox.put)
            yield Opened(completion.model, completion.seed, completion.prompt_tokens)
            unfinished = request.written
            while unfinished:
                for piece in await inbox.take():  # at once, and then only every so often
                    unfinished -= piece.finish_reason is not None
                    yield piece
                if unfinished:
                    await asyncio.sleep(GATHER_SECONDS)
        except GenmodelsError as error:
            yield _refusal(error)
        finally:
            if completion is not None:  # the client may have left
                completion.leave()

    def _preload(self) -> None:
        """A new replica has every model in memory before it takes traffic; one that fails stands in no other's way."""
        try:
            found = [version for _, version, aliases in self._list() if version.version == aliases.get("production")]
        except GenmodelsError as error:
            logger.warning("nothing preloaded: %s", error)
            return
        for version in found[: self._max_loaded]:
            try:
                self._keep(version.name, load(self._registry, version))
            except GenmodelsError as error:
                logger.warning("%s not preloaded: %s", version.name, error)

    def _list(self) -> list[tuple[str, Version, dict[str, int]]]:
        """(name to ask for it, version, aliases) of every model."""
        found = []
        for model in self._registry.models():
            aliases = _aliases(self._registry, model)
            try:
                version = self._registry.resolve(model if "production" in aliases else f"{model}@latest")
            except ModelNotFound:
                continue  # the last of its versions was deleted just now
            found.append((model if "production" in aliases else version.name, version, aliases))
        return found

    async def _resolve(self, name: str) -> Version:
        return await self._believe(f"{name}/version", lambda: self._registry.resolve(name))

    async def _believe(self, key: str, look: Callable[[], T]) -> T:
        """What storage said a moment ago, else what it says now; through an outage, what it said last."""
        known = self._resolved.get(key)
        if known and time.monotonic() - known[0] < RESOLVE_SECONDS:
            return known[1]
        try:
            value = await _in(self._lookups, look)
        except StorageUnavailable:
            if known is None:
                raise
            value = known[1]
        if len(self._resolved) >= RESOLVE_ENTRIES:  # 3, 03, 003, ...: one version has any number of names
            self._resolved.clear()
        self._resolved[key] = time.monotonic(), value
        return value

    async def _load(self, version: Version) -> Loaded:
        """The version in memory. Requests that come while it loads wait for the same load."""
        if loaded := self._loaded.get(version.name):
            self._loaded.move_to_end(version.name)
            return loaded
        task = self._loading.get(version.name)
        if task is None:
            task = self._loading[version.name] = asyncio.create_task(self._load_now(version))
            task.add_done_callback(lambda _: self._loading.pop(version.name))
        return await asyncio.shield(task)  # one client's leaving does not end it for the others

    async def _load_now(self, version: Version) -> Loaded:
        loaded = await _in(self._threads, load, self._registry, version)
        self._keep(version.name, loaded)
        return loaded

    def _keep(self, name: str, loaded: Loaded) -> None:
        self._loaded[name] = loaded
        if isinstance(loaded, TextModel):
            threading.Thread(target=self._decode, args=(loaded,), name=f"decode {name}", daemon=True).start()
        while len(self._loaded) > self._max_loaded:
            _, unloaded = self._loaded.popitem(last=False)
            if isinstance(unloaded, TextModel):
                unloaded.batcher.close()

    def _decode(self, model: TextModel) -> None:
        torch.set_num_threads(self._torch_threads)
        model.batcher.run()

    async def _describe(self, name: str, version: Version, aliases: dict[str, int]) -> Entry:
        """What only a loaded model knows of itself is kept when the model goes."""
        known = self._entries.get(version.name)
        if known is None:
            try:
                known = _entry(version, await self._load(version))
            except GenmodelsError as error:
                return Entry(name, version, aliases, problem=_refusal(error).message)
            self._entries[version.name] = known
        return Entry(name, version, aliases, known.kind, known.verbs, known.shape)


def created(version: Version) -> int:
    """When a version was published, in seconds since 1970."""
    return int(datetime.fromisoformat(version.created).timestamp())


class Inbox:
    """Pieces on their way from an engine's thread to a coroutine, which is woken once for all that have come."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._woken = False
        self._items: deque[Piece | Exception] = deque()

    def put(self, item: Piece | Exception) -> None:
        self._items.append(item)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> list[Piece]:
        """All that has come, at least one piece; those of one choice joined. An error is raised once it is the next."""
        await self._arrived.wait()
        self._arrived.clear()
        self._woken = False  # before the look, so that what comes after it wakes anew
        joined: dict[int, Piece] = {}
        while self._items:
            item = self._items.popleft()
            if isinstance(item, Exception):
                raise item
            last = joined.get(item.index)
            joined[item.index] = last + item if last else item
        return list(joined.values())


def _entry(version: Version, loaded: Loaded) -> Entry:
    shape: dict[str, int | str] = {}
    if isinstance(loaded, ImageModel):
        info, latent_dim = loaded.family.data, loaded.family.latent_dim
        shape = {"size": f"{info.width}x{info.height}", "channels": info.channels, "latent_dim": latent_dim}
    elif isinstance(loaded, TextModel):
        shape = {"block_size": loaded.family.block_size, "vocab_size": loaded.tokenizer.vocab_size}
    return Entry(version.name, version, {}, loaded.family.kind, tuple(sorted(loaded.family.verbs)), shape)


def _aliases(registry: Registry, model: str) -> dict[str, int]:
    return {name: alias.version for name, alias in registry.aliases(model).items()}


def _refusal(error: GenmodelsError) -> RequestError:
    """What a client is told."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, StorageUnavailable):
        return RequestError(
            "the storage of models does not answer; try again in a moment", status=503, code="storage_unavailable"
        )
    return RequestError(f"this version cannot be served: {error}", param="model", status=503, code="version_damaged")


async def _in(threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
