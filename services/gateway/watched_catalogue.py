"""Follow the catalogue in the gateway: which models there are, and which pool of hosts each one is for."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from genmodels.errors import GenmodelsError, ModelNotFound, StorageUnavailable
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.entries import ModelEntry
from genmodels.registry.evaluations import Evaluation, newest
from genmodels.registry.references import resolve_model
from genmodels.registry.versions import VersionReader
from genmodels.storage import Storage
from genmodels.threads import Rounds
from services.gateway.catalog import CatalogEntry, from_catalogue
from services.gateway.pool_config import DEFAULT

READ_SECONDS = 1.0  # between two reads of the catalogue

logger = logging.getLogger("ray.serve")


class WatchedCatalogue:
    """The catalogue as a thread of this process reads it each second; while storage is away, the last one stays."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.reader, self._versions = storage, CatalogueReader(storage), VersionReader(storage)
        self._rounds = Rounds("catalogue-reader", logger, lasting=True)
        self._read()  # before the first request
        threading.Thread(target=self._watch, name="catalogue-reader", daemon=True).start()

    def pool_of(self, name: str) -> str:
        """Return the pool of the version behind a name.

        The catalogue lacks older versions and checkpoints of runs: they get the pool of the model's latest version.
        """
        model, _, reference = name.partition("@")
        entry = self.reader.get(model)
        return _pool(entry, reference or "production") if entry else DEFAULT

    def describe(self, name: str) -> CatalogEntry | None:
        """Describe a model without its host and its evaluation; None if the catalogue does not have the version."""
        return from_catalogue(self.reader, name)

    def check(self, name: str) -> None:
        """Raise ModelNotFound if there is no such model. Storage is read only for what the catalogue does not have."""
        if self.describe(name):
            return
        try:
            resolve_model(self._storage, name)
        except ModelNotFound:
            raise
        except GenmodelsError:  # damaged, or storage does not answer: a host reports that
            return

    def evaluation(self, model: str, version: int) -> Evaluation | None:
        """Read the newest evaluation of a version; None if it has none or storage does not answer."""
        with contextlib.suppress(StorageUnavailable):
            return newest(self._versions, model, version)
        return None

    def stalled(self) -> str | None:
        """Return why no reading has completed for long; None if all is well."""
        return self._rounds.stalled()

    def _watch(self) -> None:
        while True:
            time.sleep(READ_SECONDS)
            self._read()

    def _read(self) -> None:
        with self._rounds.round():
            try:
                self.reader.refresh()
            except StorageUnavailable as error:
                logger.warning("the catalogue of models cannot be read: %s", error)


def _pool(entry: ModelEntry, reference: str) -> str:
    numbers = (entry.number(reference), entry.latest)
    known = (entry.versions[number] for number in numbers if number in entry.versions)
    return next((version.pool for version in known), DEFAULT)
