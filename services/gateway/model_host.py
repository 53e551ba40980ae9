"""A pool's model host: has in memory what the registry's names mean, and answers requests to them.

It follows the registry, so that nobody needs telling of a new version or a moved alias, and no replica restarts.
What is wrong with a request comes back as a value; an exception Serve would log with its traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import torch

from genmodels.engine import history
from genmodels.engine.alias_watcher import Follower, Refused
from genmodels.engine.evaluation_metrics import Measured
from genmodels.engine.history import History
from genmodels.engine.image import requests
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import ImageAnswer, ImageRequest
from genmodels.engine.model import Loaded
from genmodels.engine.model_cache import Shelf
from genmodels.engine.text import completion as text
from genmodels.engine.text.choices import Piece
from genmodels.engine.text.completion import Vocabulary
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import DamagedObject, GenmodelsError, ModelNotFound, RequestError, StorageUnavailable
from genmodels.registry.evaluations import Evaluation, newest
from genmodels.registry.references import ResolvedModel, of_version
from genmodels.registry.store import Registry
from genmodels.sizing.memory import HOST_MEMORY
from genmodels.storage import open_storage
from genmodels.threads import Rounds

FOLLOW_SECONDS = 1.0  # between two looks at the registry
LISTED_SECONDS = 1.0  # how long the list of models is believed
GATHER_SECONDS = 0.05  # of text that travels as one piece: each hop between processes costs about a token's time
TRIES = 3  # to have a model in memory that others push out

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """A completion has been accepted."""

    model: str
    family: str
    seed: int | list[int]
    prompt_tokens: int


@dataclass(frozen=True)
class Entry:
    """A model as `GET /v1/models` shows it."""

    id: str
    found: ResolvedModel | None  # None: even what it stands for cannot be read
    aliases: dict[str, int]
    kind: str | None = None
    verbs: tuple[str, ...] = ()
    shape: dict[str, int | str] | None = None
    problem: str | None = None  # why it cannot be served
    refused: dict[str, Refused] | None = None  # aliases that have moved to what is not served
    evaluation: Evaluation | None = None  # the newest of the version, where one model was asked about

    @property
    def model(self) -> str:
        return self.id.partition("@")[0]


class ModelHost:
    """Serves all that the registry names, and checkpoints of runs.

    Args:
        memory: bytes of models; those not asked for the longest go first.
        workers: requests for pictures worked on at the same time; those to one model share passes through it.
        torch_threads: of each computation.
    """

    def __init__(
        self, storage_url: str, *, memory: int = HOST_MEMORY, workers: int = 4, torch_threads: int = 1
    ) -> None:
        torch.set_num_threads(torch_threads)
        self._registry = Registry(open_storage(storage_url, in_use=True))
        self._shelf = Shelf(self._registry.storage, memory, functools.partial(_start, torch_threads=torch_threads))
        self._rounds = Rounds("follow", logger, lasting=True)
        self._follower = Follower(self._registry.storage, self._shelf, self._rounds)
        self._measured = Measured(self._registry)
        self._threads, self._lookups = (  # names are found while all workers compute
            ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(torch_threads,))
            for count, name in ((workers, "model"), (4, "registry"))
        )
        self._readers = ThreadPoolExecutor(2, "history")  # a long run's history takes its time
        self._listed: tuple[float, list[tuple[str, ResolvedModel | DamagedObject, dict[str, int]]]] | None = None
        self._entries: dict[str, Entry] = {}
        self._evaluations: dict[str, Evaluation | None] = {}  # of versions that were asked about
        self._known_aliases: dict[str, dict[str, int]] = {}  # of models that were asked about
        self.follow()  # a new replica has in memory what aliases mean before it takes traffic
        threading.Thread(target=_follow, args=(weakref.ref(self),), name="follow", daemon=True).start()

    def follow(self) -> None:
        """Look at the registry once, and load what is new. Whatever goes wrong with one model is no other's."""
        with self._rounds.round():
            try:
                self._follower.follow()
                self._measured.show(self._follower.served())
            except StorageUnavailable as error:  # all stays as it is
                logger.warning("the registry cannot be followed: %s", error)

    async def health(self) -> str | None:
        """Say why this host is not well, None if it is: what it serves may be out of date."""
        return self._rounds.stalled()

    def check_health(self) -> None:
        """Tell Serve, by raising, to replace this replica: its thread that follows the registry hangs or has ended."""
        if self._rounds.stuck():
            raise RuntimeError(self._rounds.stalled())

    async def models(self) -> list[Entry] | RequestError:
        """All models, each by what its bare name means, or by its newest version if that means nothing."""
        try:
            if self._listed is None or time.monotonic() - self._listed[0] > LISTED_SECONDS:
                self._listed = time.monotonic(), await _in(self._lookups, self._list)
        except StorageUnavailable as error:
            if self._listed is None:
                return _refusal(error)
        except GenmodelsError as error:
            return _refusal(error)
        return [await self._describe(*listed) for listed in self._listed[1]]

    async def model(self, name: str) -> Entry | RequestError:
        try:
            found = await self._find(name)
            aliases = await self._aliases_of(found.model)
        except GenmodelsError as error:
            return _refusal(error)
        entry = await self._describe(name, found, aliases)
        return dataclasses.replace(entry, evaluation=await self._evaluation_of(entry.found or found))

    async def answer(self, name: str, request: ImageRequest) -> ImageAnswer | RequestError:
        try:
            async with self._using(name) as loaded:
                return await _in(self._threads, requests.answer, loaded, request)
        except GenmodelsError as error:
            return _refusal(error)

    async def vocabulary(self, name: str) -> Vocabulary | RequestError:
        try:
            async with self._using(name) as loaded:
                return await _in(self._lookups, text.vocabulary, loaded)
        except GenmodelsError as error:
            return _refusal(error)

    async def history(self, name: str, points: int = history.MAX_ROWS) -> History | RequestError:
        try:
            return await _in(self._readers, history.read, self._registry.storage, await self._find(name), points)
        except GenmodelsError as error:
            return _refusal(error)

    async def sample(self, name: str, step: int, file: str) -> bytes | RequestError:
        try:
            found = await self._find(name)
            return await _in(self._readers, history.read_sample, self._registry.storage, found, step, file)
        except GenmodelsError as error:
            return _refusal(error)

    async def complete(
        self, name: str, request: CompletionRequest
    ) -> AsyncGenerator[Opened | Piece | RequestError, None]:
        """One `Opened`, then pieces; a `RequestError` at any place is the last item."""
        began, completion = time.monotonic(), None
        try:
            async with self._using(name) as loaded:
                completion = text.complete(loaded, request)
                inbox = Inbox()
                completion.start(inbox.put, began)
                yield Opened(completion.model, loaded.family.family_name(), completion.seed, completion.prompt_tokens)
                unfinished = request.choices
                while unfinished:
                    for piece in await inbox.take():  # at once, and then only every so often
                        unfinished -= piece.finish_reason is not None
                        yield piece
                    if unfinished:
                        await inbox.gather(GATHER_SECONDS)
        except GenmodelsError as error:
            yield _refusal(error)
        finally:
            if completion is not None:  # the client may have left
                completion.leave()

    @contextlib.asynccontextmanager
    async def _using(self, name: str) -> AsyncIterator[Loaded]:
        """The model that a name means, in memory as long as this lasts."""
        found = await self._find(name)
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(TRIES):
                    try:
                        loaded = stack.enter_context(self._shelf.using(found.name))
                        break
                    except KeyError:  # never loaded, or gone to make room
                        await _in(self._lookups, self._shelf.bring, found)
                else:
                    message = "too many models are asked for at once; try again"
                    raise RequestError(message, status=503, code="memory_full")
                yield loaded
        except GenmodelsError as error:
            refusal = _refusal(error)
            refusal.refused_by = found.name, found.family
            raise refusal from None

    async def _find(self, name: str) -> ResolvedModel:
        known = self._follower.known(name)
        return known if known else await _in(self._lookups, self._follower.find, name)

    async def _aliases_of(self, model: str) -> dict[str, int]:
        """As they were last seen, where storage does not answer."""
        with contextlib.suppress(StorageUnavailable):
            self._known_aliases[model] = await _in(self._lookups, _aliases, self._registry, model)
        return self._known_aliases.get(model, {})

    async def _evaluation_of(self, found: ResolvedModel) -> Evaluation | None:
        """The newest; where storage does not answer, that of the last look."""
        if found.version is not None:
            with contextlib.suppress(StorageUnavailable):
                look = _in(self._lookups, newest, self._registry, found.model, found.version)
                self._evaluations[found.name] = await look
        return self._evaluations.get(found.name)

    def _list(self) -> list[tuple[str, ResolvedModel | DamagedObject, dict[str, int]]]:
        """(name to ask for it, what it means or why that cannot be read, aliases) of every model."""
        listed: list[tuple[str, ResolvedModel | DamagedObject, dict[str, int]]] = []
        for model in self._registry.models():
            aliases = _aliases(self._registry, model)
            bare = "production" in self._registry.alias_names(model)
            with contextlib.suppress(ModelNotFound):  # the last of its versions was deleted just now
                try:
                    version = self._registry.resolve(model if bare else f"{model}@latest")
                    listed.append((model if bare else version.name, of_version(self._registry, version), aliases))
                except DamagedObject as error:
                    listed.append((model, error, aliases))
        return listed

    async def _describe(self, name: str, found: ResolvedModel | DamagedObject, aliases: dict[str, int]) -> Entry:
        """What only a loaded model knows of itself is kept when the model goes."""
        found = self._follower.known(name) or found  # what answers, maybe not yet what is registered
        refused = self._follower.refusals(name.partition("@")[0])
        if isinstance(found, DamagedObject):
            return Entry(name, None, aliases, problem=_refusal(found).message, refused=refused)
        known = self._entries.get(found.name)
        if known is None:
            try:
                async with self._using(name) as loaded:
                    known = self._entries[found.name] = _entry(found, loaded)
            except GenmodelsError as error:
                return Entry(name, found, aliases, problem=_refusal(error).message, refused=refused)
        return Entry(name, found, aliases, known.kind, known.verbs, known.shape, refused=refused)


def created(found: ResolvedModel) -> int:
    """When a version was published, or the attempt began that wrote a checkpoint, in seconds since 1970."""
    return int(datetime.fromisoformat(found.created).timestamp()) if found.created else 0


def _follow(host: weakref.ref[ModelHost]) -> None:
    """As long as somebody has the host."""
    while True:
        time.sleep(FOLLOW_SECONDS)
        alive = host()
        if alive is None:
            return
        alive.follow()
        del alive


def _start(loaded: Loaded, torch_threads: int) -> None:
    if isinstance(loaded, TextModel):
        name = f"decode {loaded.name}"
        threading.Thread(target=_decode, args=(loaded, torch_threads), name=name, daemon=True).start()


def _decode(model: TextModel, torch_threads: int) -> None:
    torch.set_num_threads(torch_threads)
    rounds, ended = Rounds("decode", logger), False
    while not ended:
        with rounds.round():
            model.batcher.run()
            ended = True
        if not ended:
            time.sleep(FOLLOW_SECONDS)


class Inbox:
    """Pieces on their way from an engine's thread to a coroutine, which is woken once for all that have come."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._woken = False
        self._items: deque[Piece | Exception] = deque()

    def put(self, item: Piece | Exception) -> None:
        self._items.append(item)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._arrived.set)
        if isinstance(item, Exception) or item.finish_reason:
            self._loop.call_soon_threadsafe(self._ended.set)

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

    async def gather(self, seconds: float) -> None:
        """Let more come for so long, but not behind the end of a choice."""
        timer = self._loop.call_later(seconds, self._ended.set)
        await self._ended.wait()
        timer.cancel()
        self._ended.clear()


def _entry(found: ResolvedModel, loaded: Loaded) -> Entry:
    shape: dict[str, int | str] = {}
    if isinstance(loaded, ImageModel):
        info, latent_dim = loaded.family.data, loaded.family.latent_dim
        shape = {"size": f"{info.width}x{info.height}", "channels": info.channels, "latent_dim": latent_dim}
        if loaded.family.num_classes:
            shape["num_classes"] = loaded.family.num_classes
    elif isinstance(loaded, TextModel):
        shape = {"block_size": loaded.family.block_size, "vocab_size": loaded.tokenizer.vocab_size}
        shape["example_prompt"] = loaded.tokenizer.example_prompt
    return Entry(found.name, found, {}, loaded.family.kind, tuple(sorted(loaded.family.verbs)), shape)


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
    return RequestError(f"this model cannot be served: {error}", param="model", status=503, code="version_damaged")


async def _in(threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
