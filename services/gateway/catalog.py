"""Describe a model for `GET /v1/models/{model}`: from the catalogue, and with what only its host knows of it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from genmodels.engine.alias_watcher import AliasWatcher, Refused
from genmodels.engine.model import LoadedModel
from genmodels.errors import CheckpointError, GenmodelsError, StorageUnavailable
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.evaluations import Evaluation, newest
from genmodels.registry.references import ResolvedModel
from genmodels.registry.store import Registry
from services.gateway.models import Models, as_request_error, in_thread


@dataclass(frozen=True)
class CatalogEntry:
    """A model as `GET /v1/models` shows it."""

    id: str
    resolved: ResolvedModel
    aliases: dict[str, int]  # version by alias
    kind: str | None = None
    verbs: tuple[str, ...] = ()
    sizes: dict[str, int | str] | None = None  # as `LoadedModel.describe` returns them
    problem: str | None = None  # why the model cannot be served
    refused: dict[str, Refused] | None = None  # versions that aliases point to and that are not served, by alias
    evaluation: Evaluation | None = None  # the newest of the version, if one model was requested

    @property
    def model(self) -> str:
        return self.id.partition("@")[0]

    @property
    def created(self) -> int:
        """Return the time of the version's publication, or of the start of a checkpoint's attempt, as Unix time."""
        return int(datetime.fromisoformat(self.resolved.created).timestamp()) if self.resolved.created else 0


class Catalog:
    """Describe models, from the registry and from the loaded models. All methods are for one event loop.

    Args:
        threads: for reading from storage.
    """

    def __init__(
        self,
        registry: Registry,
        watcher: AliasWatcher,
        models: Models,
        threads: ThreadPoolExecutor,
        catalogue: CatalogueReader,
    ) -> None:
        self._registry, self._watcher, self._models, self._threads = registry, watcher, models, threads
        self._catalogue = catalogue
        self._entries: dict[str, CatalogEntry] = {}  # what only a loaded model tells of itself, by exact name
        self._evaluations: dict[str, Evaluation | None] = {}  # the last ones that were read, by exact name

    async def get(self, name: str, resolved: ResolvedModel) -> CatalogEntry:
        """Describe one model, with the newest evaluation of its version."""
        listed = self._catalogue.get(resolved.model)
        entry = await self._describe(name, resolved, listed.aliases if listed else {})
        return dataclasses.replace(entry, evaluation=await self._evaluation_of(entry.resolved or resolved))

    async def _evaluation_of(self, resolved: ResolvedModel) -> Evaluation | None:
        """Return a version's newest evaluation; the last known one if storage does not answer."""
        if resolved.version is not None:
            with contextlib.suppress(StorageUnavailable):
                read = in_thread(self._threads, newest, self._registry, resolved.model, resolved.version)
                self._evaluations[resolved.name] = await read
        return self._evaluations.get(resolved.name)

    async def _describe(self, name: str, resolved: ResolvedModel, aliases: dict[str, int]) -> CatalogEntry:
        """Describe a model; what a loaded model tells of itself is kept after it is unloaded."""
        resolved = self._watcher.cached(name) or resolved  # the version that answers may be older than the alias
        refused = self._watcher.refusals(name.partition("@")[0])
        reason = next((other.reason for other in refused.values() if other.resolved == resolved), None)
        if reason:
            problem = as_request_error(CheckpointError(reason)).message
            return CatalogEntry(name, resolved, aliases, problem=problem, refused=refused)
        known = self._entries.get(resolved.name) or from_catalogue(self._catalogue, resolved.name)
        if known is None:
            try:
                async with self._models.acquire(name) as model:
                    known = self._entries[resolved.name] = _entry(resolved, model)
            except GenmodelsError as error:
                problem = as_request_error(error).message
                return CatalogEntry(name, resolved, aliases, problem=problem, refused=refused)
        return CatalogEntry(name, resolved, aliases, known.kind, known.verbs, known.sizes, refused=refused)


def from_catalogue(catalogue: CatalogueReader, name: str) -> CatalogEntry | None:
    """Describe the version behind a name without its host; None if the catalogue does not have this version."""
    model, _, reference = name.partition("@")
    entry = catalogue.get(model)
    number = entry.number(reference or "production") if entry else None
    summary = entry.versions.get(number) if entry and number else None
    if entry is None or summary is None:
        return None
    resolved = ResolvedModel(
        name=f"{model}@{number}",
        model=model,
        version=number,
        job=summary.job,
        checkpoint=summary.checkpoint,
        family=summary.family,
        created=summary.created,
        metrics={name: math.nan if value is None else value for name, value in summary.metrics.items()},
        files={},
        keys={},
    )
    serving = summary.serving
    return CatalogEntry(name, resolved, entry.aliases, serving.kind, tuple(serving.verbs), serving.sizes)


def _entry(resolved: ResolvedModel, model: LoadedModel) -> CatalogEntry:
    family = model.family
    return CatalogEntry(resolved.name, resolved, {}, family.kind, tuple(sorted(family.verbs)), model.describe())
