"""What the names that move mean: the newer model is loaded while the older one answers, and then takes its place."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from genmodels.engine.model_cache import Shelf
from genmodels.errors import DamagedObject, GenmodelsError, ModelNotFound, StorageUnavailable, contained
from genmodels.metrics import ACTIVE, REFUSED, SWAPPED, Labels, version_labels
from genmodels.registry.references import ResolvedModel, is_mutable, resolve_model, with_default_alias
from genmodels.registry.store import Registry
from genmodels.storage import Storage
from genmodels.threads import Rounds

BELIEVED_SECONDS = 1.0  # what a name that does not move means: a version may be deleted
BELIEVED = 1024  # 3, 03, 003, ...: one version has any number of names
WANTED_SECONDS = 600.0  # how long `latest` or `live` is followed after it was asked for

logger = logging.getLogger("genmodels.serving")


@dataclass(frozen=True)
class Refused:
    """A name does not answer as what it stands for. `found` is None where even that cannot be read."""

    reason: str
    found: ResolvedModel | None = None

    @property
    def version(self) -> int | None:
        return self.found.version if self.found else None


class Follower:
    """Safe between threads; `follow` is for one at a time.

    Each name stands alone: whatever goes wrong with one becomes its refusal, what answered to it goes on answering, and
    the next round tries again.

    Args:
        rounds: of the thread that follows.
    """

    def __init__(self, storage: Storage, shelf: Shelf, rounds: Rounds) -> None:
        self._storage, self._registry, self._shelf, self._rounds = storage, Registry(storage), shelf, rounds
        self._aliases: set[str] = set()  # as of the last look
        self._current: dict[str, ResolvedModel] = {}  # what answers to a name that moves
        self._wanted: dict[str, float] = {}  # when those that are no aliases were asked for
        self._believed: OrderedDict[str, tuple[float, ResolvedModel]] = OrderedDict()
        self._active: set[Labels] = set()  # what aliases mean here
        self._lock = threading.Lock()
        self.refused: dict[str, Refused] = {}

    def known(self, name: str) -> ResolvedModel | None:
        """What a name means, if that is known without asking storage."""
        name = with_default_alias(name)
        if is_mutable(name):
            if name in self._wanted:
                self._wanted[name] = time.monotonic()
            return self._current.get(name)
        believed = self._believed.get(name)
        return believed[1] if believed and time.monotonic() - believed[0] < BELIEVED_SECONDS else None

    def find(self, name: str) -> ResolvedModel:
        """What a name means. One that moves is loaded, and followed from then on.

        Raises:
            ModelNotFound: nothing.
            CheckpointError: what it means cannot be served.
            RequestError: there is no room for it.
        """
        if known := self.known(name):
            return known
        name = with_default_alias(name)
        try:
            found = resolve_model(self._storage, name)
        except StorageUnavailable:
            if believed := self._believed.get(name):
                return believed[1]
            raise
        if not is_mutable(name):
            self._believe(name, found)
            return found
        self._shelf.bring(found)
        with self._lock:
            self._wanted[name] = time.monotonic()
            return self._current.setdefault(name, found)

    def follow(self) -> None:
        """Look once at every alias, and at what was asked for lately; returns when all that has moved is in memory.

        Raises:
            StorageUnavailable: all stays as it is.
        """
        aliases = self._look()
        self._aliases = set(aliases)
        oldest = time.monotonic() - WANTED_SECONDS
        self._wanted = {name: asked for name, asked in self._wanted.items() if asked > oldest and name not in aliases}
        moved = [name for name, version in aliases.items() if version is not None and self._is_due(name, version)]
        for name in [*sorted(moved, key=lambda name: not name.endswith("@production")), *self._wanted]:
            with self._rounds.round(StorageUnavailable):
                self._advance(name)
        for name in {*list(self._current), *self.refused} - {*aliases, *self._wanted}:
            self._forget(name)
        self._count_active(aliases)

    def served(self) -> list[ResolvedModel]:
        """What answers to the names that are followed."""
        return list(self._current.values())

    def refusals(self, model: str) -> dict[str, Refused]:
        """Those of a model's aliases, by alias."""
        names = [name for name in list(self.refused) if name in self._aliases and name.partition("@")[0] == model]
        return {name.partition("@")[2]: refused for name in names if (refused := self.refused.get(name))}

    def _look(self) -> dict[str, int | None]:
        """Where each alias stands; None where that cannot be read."""
        found: dict[str, int | None] = {}
        for model in self._registry.models():
            for alias in self._registry.alias_names(model):
                name = f"{model}@{alias}"
                try:
                    found[name] = self._registry.alias(model, alias).version
                except ModelNotFound:
                    continue  # deleted just now
                except DamagedObject as error:
                    found[name] = None
                    self._refuse(name, error, None)
        return found

    def _is_due(self, name: str, version: int) -> bool:
        current = self._current.get(name)
        return current is None or current.version != version or name in self.refused

    def _advance(self, name: str) -> None:
        """Have a name mean what it means now."""
        found = None
        try:
            found = resolve_model(self._storage, name)
            self._take(name, found)
        except StorageUnavailable:
            raise
        except ModelNotFound:
            self._forget(name)
        except Exception as error:  # of whatever kind: a damaged object, a full disk, no memory, a bug
            self._refuse(name, contained(error), found)

    def _take(self, name: str, found: ResolvedModel) -> None:
        before = self._current.get(name)
        if before is None or before.name != found.name:
            self._shelf.bring(found)
            self._current[name] = found
            if before:
                self._release(before)
                SWAPPED.labels(*version_labels(found.name, found.family)).inc()
        self.refused.pop(name, None)

    def _refuse(self, name: str, error: GenmodelsError, found: ResolvedModel | None) -> None:
        known, refused = self.refused.get(name), Refused(str(error), found)
        self.refused[name] = refused
        if known and (known.found.name if known.found else known.reason) == (found.name if found else refused.reason):
            return
        logger.warning("%s is not served as %s: %s", found.name if found else "what it stands for", name, error)
        if found:
            REFUSED.labels(*version_labels(found.name, found.family)).inc()

    def _forget(self, name: str) -> None:
        self.refused.pop(name, None)
        if found := self._current.pop(name, None):
            self._release(found)

    def _release(self, found: ResolvedModel) -> None:
        if all(other.name != found.name for other in list(self._current.values())):
            self._shelf.release(found.name)

    def _count_active(self, aliases: Iterable[str]) -> None:
        meant = [found for name in aliases if (found := self._current.get(name))]
        active = {version_labels(found.name, found.family) for found in meant}
        for labels in active - self._active:
            ACTIVE.labels(*labels).inc()
        for labels in self._active - active:
            ACTIVE.labels(*labels).dec()
        self._active = active

    def _believe(self, name: str, found: ResolvedModel) -> None:
        with self._lock:
            self._believed[name] = time.monotonic(), found
            self._believed.move_to_end(name)
            if len(self._believed) > BELIEVED:
                self._believed.popitem(last=False)
