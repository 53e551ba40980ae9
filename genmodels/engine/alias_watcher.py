"""Follow the registry's mutable names: a new version is loaded while the old one answers, and then replaces it.

Models are loaded for requests. What a name refers to comes from the catalogue, which costs one request to storage each
second whatever the number of models is. If an alias moves while its version is in memory, the new version is loaded in
the background; otherwise only the name changes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

from genmodels.engine.model_cache import MEMORY_KEPT, ModelCache
from genmodels.errors import GenmodelsError, ModelNotFound, RequestError, StorageUnavailable, contained
from genmodels.metrics import ACTIVE, REFUSED, SWAPPED, Labels, version_labels
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.references import (
    ResolvedModel,
    is_checkpoint_reference,
    is_mutable,
    resolve_model,
    with_default_alias,
)
from genmodels.storage import Storage
from genmodels.threads import Rounds

CACHE_TTL_SECONDS = 1.0  # for names that are not in the catalogue
MAX_CACHED = 4096  # names of models that were resolved
MAX_UNANSWERED = 3  # names for which storage does not answer in one round; the others then wait for the next round
WATCH_SECONDS = 600.0  # a checkpoint's name such as `live` is watched for so long after its last request

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
    """Know the model behind each name, and replace the models in memory whose names move.

    Thread-safe, but only one thread may call `refresh`. Names are independent: an error of one name becomes its entry
    in `refused`, its previous version keeps serving, and the next `refresh` tries again.

    Args:
        rounds: of the thread that calls `refresh`.
    """

    def __init__(self, storage: Storage, catalogue: CatalogueReader, cache: ModelCache, rounds: Rounds) -> None:
        self._storage, self._catalogue, self._cache, self._rounds = storage, catalogue, cache, rounds
        self._serving: dict[str, ResolvedModel] = {}  # the model in memory that answers, by mutable name
        self._requested: dict[str, float] = {}  # time of the last request, by the mutable name of a checkpoint
        # (monotonic time until which it holds without the catalogue, model), by name: the exact one of the catalogue's
        self._resolved: OrderedDict[str, tuple[float, ResolvedModel]] = OrderedDict()
        self._unanswered: set[str] = set()  # names for which storage did not answer in the last round
        self._swaps: set[str] = set()  # names whose new version is being loaded
        self._active: set[Labels] = set()  # versions in memory that aliases point to
        self._changed: set[str] = set()  # models that no `refresh` has returned yet
        self._lock = threading.Lock()
        self.refused: dict[str, Refused] = {}

    def cached(self, name: str) -> ResolvedModel | None:
        """Return the model behind a name without a request to storage, or None if that is not possible."""
        name = with_default_alias(name)
        if serving := self._serving.get(name):
            if name in self._requested:
                self._requested[name] = time.monotonic()
            return serving
        exact = self.exact(name)
        entry = self._resolved.get(exact or name)
        return entry[1] if entry and (exact or time.monotonic() < entry[0]) else None

    def resolve(self, name: str) -> ResolvedModel:
        """Return the model behind a name, which may not be in memory.

        Raises:
            ModelNotFound: there is no such model.
            GenmodelsError: the documents of the model are damaged.
        """
        if cached := self.cached(name):
            return cached
        name = with_default_alias(name)
        exact = self.exact(name)
        name = exact or name  # a name that the catalogue does not have yet is looked up in the registry
        try:
            resolved = resolve_model(self._storage, name)
        except StorageUnavailable:
            if entry := self._resolved.get(name):
                return entry[1]
            raise
        self._remember(name, resolved, valid_until=-math.inf if exact else time.monotonic() + CACHE_TTL_SECONDS)
        return resolved

    def loaded(self, name: str, resolved: ResolvedModel) -> None:
        """Let a name follow the registry from now on: its model was loaded for a request."""
        name = with_default_alias(name)
        if not is_mutable(name) or name in self._serving:
            return
        if is_checkpoint_reference(name):
            self._requested[name] = time.monotonic()
        with self._lock:
            self._serving.setdefault(name, resolved)
        self.refused.pop(name, None)

    def failed(self, name: str, resolved: ResolvedModel | None, error: GenmodelsError) -> None:
        """Report that the model behind a name cannot be served."""
        self._refuse(with_default_alias(name), error, resolved)

    def unanswered(self, name: str) -> None:
        """Report that storage does not answer for a name."""
        self.failed(name, None, GenmodelsError("storage does not answer for it; what is in memory keeps serving"))

    def exact(self, name: str) -> str | None:
        """Return the name of the version behind a name, as in `shapes@3`; None if the catalogue does not have it."""
        model, _, reference = with_default_alias(name).partition("@")
        entry = self._catalogue.get(model)
        number = entry.number(reference) if entry else None
        return f"{model}@{number}" if number else None

    def refresh(self) -> set[str]:
        """Read the changes of the catalogue, and start to load new versions of models in memory.

        Returns:
            The models that have changed.

        Raises:
            StorageUnavailable: the catalogue cannot be read; the next call returns these models, and does the rest.
        """
        self._changed |= self._catalogue.refresh()
        in_memory = self._cache.names()
        self._update_all(in_memory)
        for name, refused in list(self.refused.items()):
            if name not in self._serving and refused.resolved and self.exact(name) != refused.resolved.name:
                self.refused.pop(name, None)  # it has moved; the next request tries the new version
        self._count_active(in_memory)
        changed, self._changed = self._changed, set()
        return changed

    def serving(self) -> list[ResolvedModel]:
        """Return the models in memory that answer to mutable names."""
        return list(self._serving.values())

    def refusals(self, model: str) -> dict[str, Refused]:
        """Return the refused versions of a model, by alias."""
        names = [name for name in list(self.refused) if _is_alias(name) and name.partition("@")[0] == model]
        return {name.partition("@")[2]: refused for name in names if (refused := self.refused.get(name))}

    def _update_all(self, in_memory: set[str]) -> None:
        """Update all names; those without an answer in the last round come last, so that they hold up no others."""
        unanswered = set()
        for name, serving in sorted(self._serving.items(), key=lambda item: item[0] in self._unanswered):
            with self._rounds.round():
                try:
                    self._update(name, serving, in_memory)
                except StorageUnavailable:
                    unanswered.add(name)
                    self.unanswered(name)
            if len(unanswered) == MAX_UNANSWERED:
                break
        self._unanswered = unanswered

    def _update(self, name: str, serving: ResolvedModel, in_memory: set[str]) -> None:
        """Compare the model that answers to a name with the model that the name refers to now."""
        if name in self._swaps:
            return
        resolved = None
        try:
            resolved = self._checkpoint(name) if is_checkpoint_reference(name) else None
            exact = resolved.name if resolved else self._listed(name)
            if exact == serving.name:
                self.refused.pop(name, None)
            if serving.name not in in_memory and name not in self.refused:
                self._forget(name)
            elif exact != serving.name:
                resolved = resolved or self.resolve(exact)
                self._swap(name, serving, resolved)
        except StorageUnavailable:
            raise
        except ModelNotFound:
            self._forget(name)
        except Exception as error:  # of any kind: a damaged object, a bug
            self._refuse(name, contained(error), resolved)

    def _checkpoint(self, name: str) -> ResolvedModel:
        """Return the checkpoint that a name refers to now. Raises ModelNotFound if it is gone or not in use."""
        if self._requested.get(name, -math.inf) < time.monotonic() - WATCH_SECONDS:
            raise ModelNotFound(f"{name} is not requested any more")
        return resolve_model(self._storage, name)

    def _listed(self, name: str) -> str:
        """Return the exact name of the version that a name refers to by the catalogue.

        Raises:
            ModelNotFound: there is none.
            GenmodelsError: the alias is damaged.
        """
        if exact := self.exact(name):
            return exact
        model, _, reference = name.partition("@")
        entry = self._catalogue.get(model)
        if entry and reference in entry.damaged:
            raise GenmodelsError(entry.damaged[reference])
        raise ModelNotFound(f"the catalogue has no {name}")

    def _swap(self, name: str, previous: ResolvedModel, resolved: ResolvedModel) -> None:
        """Load the model that a name refers to now; the previous one stays in memory until then."""
        keeping = contextlib.ExitStack()
        with contextlib.suppress(KeyError):
            keeping.enter_context(self._cache.keep(previous.name))
        self._swaps.add(name)

        def finish(load: Future[None]) -> None:
            with keeping:
                serves = self._finish_swap(name, resolved, load.exception())
            if serves:
                self._release(previous)
            self._swaps.discard(name)

        self._cache.load(resolved).add_done_callback(finish)

    def _finish_swap(self, name: str, resolved: ResolvedModel, error: BaseException | None) -> bool:
        """Let a model answer to a name, or report why it cannot. Return whether the previous model may go."""
        if isinstance(error, RequestError) and error.code == MEMORY_KEPT:
            self._serving.pop(name, None)  # no room for both: its next request loads it, and unloads the previous one
            return True
        if error:
            self._refuse(
                name, contained(error) if isinstance(error, Exception) else GenmodelsError(str(error)), resolved
            )
            return False
        self._serving[name] = resolved
        self.refused.pop(name, None)
        SWAPPED.labels(*version_labels(resolved.name, resolved.family)).inc()
        return True

    def _refuse(self, name: str, error: GenmodelsError, resolved: ResolvedModel | None) -> None:
        previous, refused = self.refused.get(name), Refused(str(error), resolved)
        self.refused[name] = refused
        if previous and _identity(previous) == _identity(refused):
            return  # logged and counted before
        logger.warning("%s: %s is not served: %s", name, resolved.name if resolved else "its version", error)
        if resolved:
            REFUSED.labels(*version_labels(resolved.name, resolved.family)).inc()

    def _forget(self, name: str) -> None:
        """Look a name up again at its next request. Its model stays in memory until another one needs the room."""
        self.refused.pop(name, None)
        self._requested.pop(name, None)
        self._serving.pop(name, None)

    def _release(self, resolved: ResolvedModel) -> None:
        if all(other.name != resolved.name for other in list(self._serving.values())):
            self._cache.unload_when_idle(resolved.name)

    def _count_active(self, in_memory: set[str]) -> None:
        serving = [model for name, model in list(self._serving.items()) if _is_alias(name) and model.name in in_memory]
        active = {version_labels(model.name, model.family) for model in serving}
        for labels in active - self._active:
            ACTIVE.labels(*labels).inc()
        for labels in self._active - active:
            ACTIVE.labels(*labels).dec()
        self._active = active

    def _remember(self, name: str, resolved: ResolvedModel, *, valid_until: float) -> None:
        with self._lock:
            self._resolved[name] = valid_until, resolved
            self._resolved.move_to_end(name)
            if len(self._resolved) > MAX_CACHED:
                self._resolved.popitem(last=False)


def _is_alias(name: str) -> bool:
    return is_mutable(name) and not is_checkpoint_reference(name) and not name.endswith("@latest")


def _identity(refused: Refused) -> str:
    return refused.resolved.name if refused.resolved else refused.reason
