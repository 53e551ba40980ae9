"""Keep models in memory: those that a pool names, or the newest ones in production."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Collection
from concurrent.futures import Future

from genmodels.engine.alias_watcher import AliasWatcher
from genmodels.engine.model_cache import ModelCache
from genmodels.errors import GenmodelsError, ModelNotFound, StorageUnavailable, contained
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.entries import VersionSummary
from genmodels.registry.references import ResolvedModel, with_default_alias

Pin = int | Collection[str]  # the number of the newest models, or names of models


class Pins:
    """Load pinned models, and keep them in memory until they are not pinned any more. Not thread-safe.

    Args:
        pin: a number of models takes at most half of the budget: requests to all other models need the rest.
        pool: the newest models are those of this pool.
        budget: bytes of the cache.
    """

    def __init__(
        self, catalogue: CatalogueReader, watcher: AliasWatcher, cache: ModelCache, pin: Pin, pool: str, budget: int
    ) -> None:
        self._catalogue, self._watcher, self._cache = catalogue, watcher, cache
        self._pin, self._pool, self._budget = pin, pool, budget
        self._names: list[str] | None = None
        self._kept: dict[str, contextlib.ExitStack] = {}  # by exact name
        self.loads: dict[str, Future[None]] = {}  # in progress, by exact name

    def refresh(self, changed: Collection[str]) -> None:
        """Keep the pinned models that are in memory, and start to load the others.

        Args:
            changed: models that have changed in the catalogue since the last call.

        While storage does not answer for a name, all models that were kept are still kept.
        """
        if self._names is None or changed:
            self._names = (
                self._newest(self._pin) if isinstance(self._pin, int) else list(map(with_default_alias, self._pin))
            )
        pinned, is_complete = {}, True
        for name in self._names:
            try:
                if resolved := self._resolve(name):
                    pinned[name] = resolved
            except StorageUnavailable:
                self._watcher.unanswered(name)
                is_complete = False
        for exact in set(self._kept) - {resolved.name for resolved in pinned.values()} if is_complete else ():
            self._kept.pop(exact).close()
        for name, resolved in pinned.items():
            self._keep(name, resolved)

    def _newest(self, count: int) -> list[str]:
        """Return the names of the newest models in production, as many as fit into half of the budget."""
        names, size = [], 0
        for summary, model in heapq.nlargest(count, self._in_production(), key=lambda item: item[0].created):
            size += summary.serving.memory
            if size > self._budget // 2:
                break
            names.append(with_default_alias(model))
        return names

    def _in_production(self) -> list[tuple[VersionSummary, str]]:
        entries = filter(None, map(self._catalogue.get, self._catalogue.models()))
        numbered = ((entry, entry.aliases.get("production")) for entry in entries)
        known = ((entry.versions[number], entry.model) for entry, number in numbered if number in entry.versions)
        return [(summary, model) for summary, model in known if summary.pool == self._pool]

    def _resolve(self, name: str) -> ResolvedModel | None:
        """Return the model behind a pinned name; None if there is none, which is reported."""
        try:
            if self._watcher.exact(name) is None:
                raise ModelNotFound(f"the registry has no version of the pinned name {name}")
            return self._watcher.resolve(name)
        except StorageUnavailable:
            raise
        except Exception as error:  # of any kind: one model does not affect the others
            self._watcher.failed(name, None, contained(error))
            return None

    def _keep(self, name: str, resolved: ResolvedModel) -> None:
        exact = resolved.name
        if exact in self._kept or exact in self.loads:
            return
        keeping = contextlib.ExitStack()
        try:
            keeping.enter_context(self._cache.keep(exact))
            self._kept[exact] = keeping
        except KeyError:  # not in memory; it is kept from the next call on
            self.loads[exact] = load = self._cache.load(resolved)
            load.add_done_callback(lambda load: self._loaded(name, resolved, load.exception()))

    def _loaded(self, name: str, resolved: ResolvedModel, error: BaseException | None) -> None:
        if error is None:
            self._watcher.loaded(name, resolved)
        elif isinstance(error, GenmodelsError):
            self._watcher.failed(name, resolved, error)
        self.loads.pop(resolved.name)
