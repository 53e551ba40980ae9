"""Read the catalogue of models for requests to the job service."""

from __future__ import annotations

import threading

from genmodels.errors import GenmodelsError, StorageUnavailable
from genmodels.registry.catalogue import CatalogueReader
from genmodels.storage import Storage


class FreshCatalogue:
    """Give each request the catalogue as it was after the request arrived. Thread-safe.

    A client that has promoted a version must see that, also through another job service, so no answer is older than
    its request. Requests that arrive during a read share the next one: at most one read goes on at a time, which is a
    conditional GET if nothing has changed. Without requests nothing is read.
    """

    def __init__(self, storage: Storage) -> None:
        self._reader = CatalogueReader(storage)
        self._begun = 0  # reads
        self._complete = False  # one read has ended well, so there are entries to show while storage is away
        self._error: GenmodelsError | None = None  # of the last read
        self._lock = threading.Lock()

    def read(self) -> CatalogueReader:
        """Return the catalogue; while storage is away, as it was before.

        Raises:
            GenmodelsError: it has never been read, or cannot be read although storage answers.
        """
        begun = self._begun
        with self._lock:
            if self._begun == begun:
                self._begun += 1
                self._error = self._refresh()
            if self._error:
                raise self._error
        return self._reader

    def _refresh(self) -> GenmodelsError | None:
        try:
            self._reader.refresh()
        except StorageUnavailable as error:
            return None if self._complete else error
        except GenmodelsError as error:
            return error
        self._complete = True
        return None
