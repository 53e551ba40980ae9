"""Keep the catalogue: index objects that tell everything about all models, whatever their number, in few reads.

    catalogue/head.json                         the generation of each shard; compare-and-swap
    catalogue/07.json                           the models whose names hash to 7 of 64; compare-and-swap
    catalogue/pending/<model>-<16 hex digits>   an intent: versions or aliases of the model change just now
    catalogue/pending/07, catalogue/pending/head    a reader could not read this shard, or the head

The truth stays in versions and aliases; the catalogue is derived. A writer puts an intent, changes the truth, reads the
etag of the shard, THEN the truth, swaps the shard, swaps the head, and deletes the intent. So the last swap of a shard
has read every change before it, in whatever order writers run. The catalogue never fails a writer: if a writer dies or
gets no answer, its intent remains, and the holder of the dispatcher's lease does the rest (`catalogue_keeper.py`).

A generation is a random text, new at each swap. Readers read the head once a second, by a conditional GET, and then the
shards whose generation has changed.

Without a head the catalogue does not exist yet: the storage is empty or of an earlier release. The first process that
needs the catalogue builds it without a lock: each shard in full by compare-and-swap, then the head, then it looks for
shards that the head does not name. Others may build at the same time, and writers may write: a writer that sees no head
has swapped its shard before the head was put, so the builder finds that shard.
"""

from __future__ import annotations

import hashlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from pydantic import Field

from genmodels.errors import Conflict, DamagedObject, GenmodelsError, KeyNotFound, StorageError, contained
from genmodels.registry.entries import ModelEntry, read_entry
from genmodels.registry.versions import VersionReader
from genmodels.storage import Document, Storage, load_document, write_document
from genmodels.storage.documents import damaged, load_if_changed

HEAD, PENDING = "catalogue/head.json", "catalogue/pending/"
SHARDS = tuple(f"{number:02d}" for number in range(64))
AT_ONCE = 8  # models or shards that are read at once

logger = logging.getLogger("genmodels.registry")


class Shard(Document):
    object_kind = "catalogue"
    remedy = "nothing to do: the job service builds it again; without a job service: genmodels catalogue rebuild"

    generation: str = ""
    models: dict[str, ModelEntry] = Field(default_factory=dict)


class Head(Document):
    object_kind = "catalogue"
    remedy = Shard.remedy

    shards: dict[str, str] = Field(default_factory=dict)  # the generation of each


class Catalogue:
    """Write the catalogue. Thread-safe, and safe with other processes."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self._truth = storage, VersionReader(storage)

    @contextmanager
    def following(self, model: str, *, removed: bool = False) -> Iterator[None]:
        """Bring the catalogue up to date after the body has changed versions, aliases or evaluations of a model.

        Errors of the catalogue do not reach the caller. After an error of the body the intent stays, since the change
        may have happened.

        Args:
            removed: the body removes versions.
        """
        intent = f"{PENDING}{model}-{secrets.token_hex(8)}"
        with _without_failing(model):
            self.storage.put(intent, b"")
        yield
        with _without_failing(model):
            self.update(model, removed=removed)
            self.storage.delete(intent)

    def update(self, model: str, *, removed: bool = True) -> bool:
        """Write the entry of a model from its versions and aliases; return whether it has changed.

        Args:
            removed: versions may have been removed or damaged, so all are read, not only later ones.

        Raises:
            DamagedObject: the shard or the head is damaged; `rebuild` mends both.
        """
        name, head = shard_of(model), self._head()
        while True:
            shard, etag = self._shard(name, head)
            known = shard.models.get(model)
            entry = read_entry(self._truth, model, None if removed else known)
            if entry == known:
                break
            others = {other: kept for other, kept in shard.models.items() if other != model}
            if swapped := self._swap(name, {**others, model: entry} if entry else others, etag):
                shard = swapped
                break
        if shard.generation:  # else there is no such shard, and no such model
            self._publish({name: shard.generation})
        return entry != known

    def rebuild(self) -> int:
        """Write the whole catalogue from versions and aliases; return the number of models."""
        models, written = self._names(), self._written()
        shards = {name: self._rebuild_shard(name, models[name]) for name in SHARDS if models[name] or name in written}
        self._publish({name: shard.generation for name, shard in shards.items()}, whole=True)
        for name in self._written() - shards.keys():  # by a writer that saw no head
            self._publish({name: self._shard(name, None)[0].generation})
        return sum(len(shard.models) for shard in shards.values())

    def rebuild_shard(self, name: str) -> None:
        """Write one shard from versions and aliases, and the whole catalogue if its head is damaged too."""
        shard = self._rebuild_shard(name, self._names()[name])
        try:
            self._publish({name: shard.generation})
        except DamagedObject:
            self.rebuild()

    def latest(self, model: str) -> int:
        """Return the number of the latest version that the catalogue has; 0 if it has none, or cannot be read."""
        with suppress(DamagedObject, StorageError):
            entry = load_document(self.storage, _key(shard_of(model)), Shard)[0].models.get(model)
            return entry.latest if entry else 0
        return 0

    def models_of(self, name: str) -> list[str]:
        """Return the models of a shard, those in it and those that should be. Raises DamagedObject."""
        return sorted({*self._names()[name], *self._shard(name, None)[0].models})

    def ensure(self) -> None:
        """Build the catalogue if the storage has none."""
        if not self.storage.exists(HEAD):
            models = self.rebuild()
            logger.info("the catalogue of models was built: %d models", models)

    def _names(self) -> dict[str, list[str]]:
        """Return the names of all models, by shard."""
        names: dict[str, list[str]] = {name: [] for name in SHARDS}
        for model in self._truth.names():
            names[shard_of(model)].append(model)
        return names

    def _rebuild_shard(self, name: str, models: Iterable[str]) -> Shard:
        """Write a shard with these models, and those that writers have put into it."""
        while True:
            shard, etag = Shard(), ""
            try:
                shard, etag = self._shard(name, None)
            except DamagedObject as error:
                etag = error.etag
            names = sorted({*models, *shard.models})
            with ThreadPoolExecutor(AT_ONCE) as threads:
                entries = zip(names, threads.map(lambda name: read_entry(self._truth, name), names), strict=True)
            if swapped := self._swap(name, {model: entry for model, entry in entries if entry}, etag):
                return swapped

    def _swap(self, name: str, models: Mapping[str, ModelEntry], etag: str) -> Shard | None:
        """Replace a shard; return None if another writer has replaced it since its etag was read."""
        shard = Shard(generation=secrets.token_hex(8), models=dict(models))
        try:
            body = shard.model_dump(mode="json")
            write_document(self.storage, _key(name), body, if_absent=not etag, if_match=etag or None)
        except Conflict:
            _pause()
            return None
        return shard

    def _publish(self, generations: Mapping[str, str], *, whole: bool = False) -> None:
        """Write generations into the head, so that readers read these shards.

        Args:
            whole: these are all shards, so the head may be made, and a damaged one replaced.
        """
        while True:
            head, etag = Head(), ""
            try:
                head, etag = load_document(self.storage, HEAD, Head)
            except KeyNotFound:
                if not whole:
                    return  # the first head will name this shard
            except DamagedObject as error:
                if not whole:
                    raise
                etag = error.etag
            if etag and all(head.shards.get(name) == generation for name, generation in generations.items()):
                return
            body = Head(shards={**head.shards, **generations}).model_dump(mode="json")
            try:
                write_document(self.storage, HEAD, body, if_absent=not etag, if_match=etag or None)
                return
            except Conflict:
                _pause()

    def _written(self) -> set[str]:
        """Return the names of the shards that exist."""
        return {name for key in self.storage.list("catalogue/") if _key(name := key[-7:-5]) == key}

    def _head(self) -> Head:
        with suppress(KeyNotFound):
            return load_document(self.storage, HEAD, Head)[0]
        return Head()

    def _shard(self, name: str, head: Head | None) -> tuple[Shard, str]:
        """Return a shard and its etag; an empty shard and "" if there is none.

        Raises:
            DamagedObject: the shard is damaged, or it is missing although `head` names it.
        """
        try:
            return load_document(self.storage, _key(name), Shard)
        except KeyNotFound:
            if head and name in head.shards:
                raise damaged(_key(name), "it is missing", Shard) from None
            return Shard(), ""


class CatalogueReader:
    """Keep all entries in memory. One thread may call `refresh`; the other methods are for any thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._head_etag: str | None = None
        self._generations: dict[str, str | None] = {}  # in the head, of each shard that was read
        self._shards: dict[str, tuple[Mapping[str, ModelEntry], str | None]] = {}  # and the etag of each
        self._entries: dict[str, ModelEntry] = {}
        self._names: list[str] = []
        self._changed: set[str] = set()  # that no `refresh` has returned yet
        self._reported: set[str] = set()
        self._lock = threading.Lock()

    def refresh(self) -> set[str]:
        """Read what has changed; return the names of models that were added, changed or removed.

        At rest this is one conditional GET. A damaged shard keeps its old entries until it is built again; a reader
        that has none builds it itself.

        Raises:
            StorageUnavailable: the old entries stay.
        """
        answer = self._read_head()
        if answer:
            head, etag = answer
            new = [name for name in SHARDS if head.shards.get(name) != self._generations.get(name)]
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(lambda name: self._read_shard(name, head.shards.get(name)), new))
            self._names = sorted(self._entries)
            self._head_etag = etag
            self._reported.discard("head")
        changed, self._changed = self._changed, set()
        return changed

    def get(self, model: str) -> ModelEntry | None:
        return self._entries.get(model)

    def models(self) -> list[str]:
        """Return the names of all models, sorted. Do not change the list."""
        return self._names

    def aliases(self) -> dict[str, int]:
        """Return the version of each alias of each model, by `model@alias`."""
        entries = list(self._entries.values())
        return {f"{entry.model}@{alias}": number for entry in entries for alias, number in entry.aliases.items()}

    def _read_head(self) -> tuple[Head, str] | None:
        """Return the head if it has changed. Without one, a reader that has no entries yet builds the catalogue."""
        try:
            answer = load_if_changed(self._storage, HEAD, Head, self._head_etag)
            if self._head_etag is not None or (answer and answer[0].shards):
                return answer  # else there are no models, or an odd head has lost them
        except (KeyNotFound, DamagedObject) as error:
            if self._head_etag is not None:
                self._report("head", error)
                return None
        Catalogue(self._storage).rebuild()
        return load_document(self._storage, HEAD, Head)

    def _read_shard(self, name: str, generation: str | None) -> None:
        known, etag = self._shards.get(name, ({}, None))
        try:
            answer = load_if_changed(self._storage, _key(name), Shard, etag) if generation else (Shard(), "")
        except (KeyNotFound, DamagedObject) as error:
            answer = None
            if name in self._shards:
                self._report(name, error)
            else:
                Catalogue(self._storage).rebuild_shard(name)
                answer = load_document(self._storage, _key(name), Shard)
        if answer:
            shard, etag = answer
            self._take(known, shard.models)
            self._shards[name] = shard.models, etag
            self._reported.discard(name)
        self._generations[name] = generation

    def _take(self, known: Mapping[str, ModelEntry], models: Mapping[str, ModelEntry]) -> None:
        changed = {model for model in {*known, *models} if known.get(model) != models.get(model)}
        with self._lock:
            for model in known.keys() - models.keys():
                del self._entries[model]
            self._entries.update({model: models[model] for model in changed if model in models})
            self._changed |= changed

    def _report(self, name: str, error: GenmodelsError) -> None:
        """Have the holder of the dispatcher's lease build a shard or the head again; log it once."""
        if name in self._reported:
            return
        self._reported.add(name)
        logger.warning("the catalogue's old entries stay until it is built again: %s", error)
        with suppress(StorageError):  # the next writer finds the damage too
            self._storage.put(PENDING + name, b"")


def shard_of(model: str) -> str:
    """Return the name of the shard of a model."""
    return SHARDS[hashlib.sha256(model.encode()).digest()[0] % len(SHARDS)]


def _key(shard: str) -> str:
    return f"catalogue/{shard}.json"


@contextmanager
def _without_failing(model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # also a bug: the change itself is stored
        logger.warning("the catalogue shows a change of model %r later: %s", model, contained(error))


def _pause() -> None:
    """Wait a random moment, so that writers that got in each other's way do not do so again."""
    time.sleep(random.SystemRandom().uniform(0, 0.05))  # not from the generator of training
