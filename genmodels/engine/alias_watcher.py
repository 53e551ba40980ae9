"""Watch the registry's mutable names: a new version is loaded while the old one answers, and then replaces it."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from genmodels.engine.model_cache import ModelCache
from genmodels.errors import DamagedObject, GenmodelsError, ModelNotFound, StorageUnavailable, contained
from genmodels.metrics import ACTIVE, REFUSED, SWAPPED, Labels, version_labels
from genmodels.registry.references import ResolvedModel, is_mutable, resolve_model, with_default_alias
from genmodels.registry.store import Registry
from genmodels.storage import Storage
from genmodels.threads import Rounds

CACHE_TTL_SECONDS = 1.0  # for names that are not mutable: their version may be deleted
MAX_CACHED = 1024  # 3, 03, 003, ...: one version has any number of names
WATCH_SECONDS = 600.0  # `latest` or `live` is watched for so long after its last request

logger = logging.getLogger("genmodels.serving")


@dataclass(frozen=True)
class Refused:
    """The reason why the version behind a name does not serve; `resolved` is None if the name cannot be resolved."""

    reason: str
    resolved: ResolvedModel | None = None

    @property
    def version(self) -> int | None:
        return self.resolved.version if self.resolved else None


class AliasWatcher:
    """Keep in memory the models that mutable names refer to. Thread-safe, but only one thread may call `refresh`.

    Names are independent: an error of one name becomes its entry in `refused`, its previous version keeps serving, and
    the next `refresh` tries again.

    Args:
        rounds: of the thread that calls `refresh`.
    """

    def __init__(self, storage: Storage, cache: ModelCache, rounds: Rounds) -> None:
        self._storage, self._registry, self._cache, self._rounds = storage, Registry(storage), cache, rounds
        self._aliases: set[str] = set()  # of the last `refresh`
        self._serving: dict[str, ResolvedModel] = {}  # the model that answers, by mutable name
        self._requested: dict[str, float] = {}  # time of the last request, by mutable name that is not an alias
        self._resolved: OrderedDict[str, tuple[float, ResolvedModel]] = OrderedDict()  # names that are not mutable
        self._active: set[Labels] = set()  # versions that aliases point to
        self._lock = threading.Lock()
        self.refused: dict[str, Refused] = {}

    def cached(self, name: str) -> ResolvedModel | None:
        """Return the model behind a name without a request to storage, or None if that is not possible."""
        name = with_default_alias(name)
        if is_mutable(name):
            if name in self._requested:
                self._requested[name] = time.monotonic()
            return self._serving.get(name)
        entry = self._resolved.get(name)
        return entry[1] if entry and time.monotonic() - entry[0] < CACHE_TTL_SECONDS else None

    def resolve(self, name: str) -> ResolvedModel:
        """Return the model behind a name. The model of a mutable name is loaded, and the name is watched from now on.

        Raises:
            ModelNotFound: there is no such model.
            CheckpointError: the model cannot be served.
            RequestError: there is no memory for it.
        """
        if cached := self.cached(name):
            return cached
        name = with_default_alias(name)
        try:
            resolved = resolve_model(self._storage, name)
        except StorageUnavailable:
            if entry := self._resolved.get(name):
                return entry[1]
            raise
        if not is_mutable(name):
            self._remember(name, resolved)
            return resolved
        self._cache.load(resolved)
        with self._lock:
            self._requested[name] = time.monotonic()
            return self._serving.setdefault(name, resolved)

    def refresh(self) -> None:
        """Read every alias and recently requested name once; return when all new versions are in memory.

        Raises:
            StorageUnavailable: nothing has changed.
        """
        aliases = self._read_aliases()
        self._aliases = set(aliases)
        oldest = time.monotonic() - WATCH_SECONDS
        self._requested = {
            name: requested for name, requested in self._requested.items() if requested > oldest and name not in aliases
        }
        changed = [name for name, version in aliases.items() if version is not None and self._changed(name, version)]
        for name in [*sorted(changed, key=lambda name: not name.endswith("@production")), *self._requested]:
            with self._rounds.round(StorageUnavailable):
                self._update(name)
        for name in {*list(self._serving), *self.refused} - {*aliases, *self._requested}:
            self._forget(name)
        self._count_active(aliases)

    def serving(self) -> list[ResolvedModel]:
        """Return the models that answer to the watched names."""
        return list(self._serving.values())

    def refusals(self, model: str) -> dict[str, Refused]:
        """Return the refused versions of a model, by alias."""
        names = [name for name in list(self.refused) if name in self._aliases and name.partition("@")[0] == model]
        return {name.partition("@")[2]: refused for name in names if (refused := self.refused.get(name))}

    def _read_aliases(self) -> dict[str, int | None]:
        """Return the version of each alias; None for an alias that cannot be read."""
        aliases: dict[str, int | None] = {}
        for model in self._registry.models():
            for alias in self._registry.alias_names(model):
                name = f"{model}@{alias}"
                try:
                    aliases[name] = self._registry.alias(model, alias).version
                except ModelNotFound:
                    continue  # deleted just now
                except DamagedObject as error:
                    aliases[name] = None
                    self._refuse(name, error, None)
        return aliases

    def _changed(self, name: str, version: int) -> bool:
        serving = self._serving.get(name)
        return serving is None or serving.version != version or name in self.refused

    def _update(self, name: str) -> None:
        """Resolve a name again and serve its version."""
        resolved = None
        try:
            resolved = resolve_model(self._storage, name)
            self._serve(name, resolved)
        except StorageUnavailable:
            raise
        except ModelNotFound:
            self._forget(name)
        except Exception as error:  # of any kind: a damaged object, a full disk, no memory, a bug
            self._refuse(name, contained(error), resolved)

    def _serve(self, name: str, resolved: ResolvedModel) -> None:
        previous = self._serving.get(name)
        if previous is None or previous.name != resolved.name:
            self._cache.load(resolved)
            self._serving[name] = resolved
            if previous:
                self._release(previous)
                SWAPPED.labels(*version_labels(resolved.name, resolved.family)).inc()
        self.refused.pop(name, None)

    def _refuse(self, name: str, error: GenmodelsError, resolved: ResolvedModel | None) -> None:
        previous, refused = self.refused.get(name), Refused(str(error), resolved)
        self.refused[name] = refused
        if previous and _identity(previous) == _identity(refused):
            return  # logged and counted before
        logger.warning("%s: %s is not served: %s", name, resolved.name if resolved else "its version", error)
        if resolved:
            REFUSED.labels(*version_labels(resolved.name, resolved.family)).inc()

    def _forget(self, name: str) -> None:
        self.refused.pop(name, None)
        if resolved := self._serving.pop(name, None):
            self._release(resolved)

    def _release(self, resolved: ResolvedModel) -> None:
        if all(other.name != resolved.name for other in list(self._serving.values())):
            self._cache.unload_when_idle(resolved.name)

    def _count_active(self, aliases: Iterable[str]) -> None:
        models = [resolved for name in aliases if (resolved := self._serving.get(name))]
        active = {version_labels(resolved.name, resolved.family) for resolved in models}
        for labels in active - self._active:
            ACTIVE.labels(*labels).inc()
        for labels in self._active - active:
            ACTIVE.labels(*labels).dec()
        self._active = active

    def _remember(self, name: str, resolved: ResolvedModel) -> None:
        with self._lock:
            self._resolved[name] = time.monotonic(), resolved
            self._resolved.move_to_end(name)
            if len(self._resolved) > MAX_CACHED:
                self._resolved.popitem(last=False)


def _identity(refused: Refused) -> str:
    return refused.resolved.name if refused.resolved else refused.reason
