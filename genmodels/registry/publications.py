"""Remember which version a checkpoint was published as, so that publishing reads no other version.

    models/<model>/published/<job>.attempt-1.step-500.json    a claim: the number that this checkpoint takes
    models/<model>/published/complete                         each version has its claim

A publisher claims a free number, by compare-and-swap, then writes the version if it is absent. Publishers of the same
checkpoint share the claim, so they write the same version. If another checkpoint has taken the number, or its version
was deleted, they claim another. Claims stay when versions are deleted.

Versions of earlier releases have no claims. They get them when the model is published to for the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pydantic import Field

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import Conflict, DamagedObject, KeyNotFound, ModelNotFound
from genmodels.registry.versions import Version, VersionReader, deleted_key, version_key
from genmodels.storage import Document, load_document, write_document


class Published(Document):
    object_kind = "claim"
    remedy = "delete it: the checkpoint is published as a new version if it is published again"

    version: int = Field(ge=1)


class Claim:
    """The number of the version of one checkpoint."""

    def __init__(self, versions: VersionReader, model: str, job: str, ref: CheckpointRef) -> None:
        self._versions, self._storage = versions, versions.storage
        self._model, self._job, self._ref = model, job, ref
        self._key = _claim_key(model, job, ref)

    def version(self) -> Version | None:
        """Return the version that the checkpoint is published as; None if there is none that can be read."""
        number, _ = self._read()
        if not number and self._index_older():
            number, _ = self._read()
        state = self._look(number)
        return state if isinstance(state, Version) else None

    def take(self, find_free: Callable[[], int]) -> Version | int:
        """Return a number to write the version under, or the version, if another publisher has written it.

        Args:
            find_free: returns a number that no version has had.
        """
        while True:
            number, etag = self._read()
            if state := self._look(number):
                return state
            claim = Published(version=find_free()).model_dump(mode="json")
            with contextlib.suppress(Conflict):  # another publisher of this checkpoint was faster
                write_document(self._storage, self._key, claim, if_absent=not etag, if_match=etag or None)

    def _look(self, number: int) -> Version | int | None:
        """Return the version with the claimed number, or the number if it is free; None if it cannot be used."""
        if not number:
            return None
        if not self._storage.exists(version_key(self._model, number)):  # a mark is written before a version is deleted
            return None if self._storage.exists(deleted_key(self._model, number)) else number
        try:
            version = self._versions.version(self._model, number)
        except (ModelNotFound, DamagedObject):  # ModelNotFound: deleted just now
            return None
        return version if (version.job, version.checkpoint) == (self._job, self._ref) else None

    def _read(self) -> tuple[int, str]:
        """Return the claimed number (0: none) and the etag of the claim ("": there is none)."""
        try:
            claim, etag = load_document(self._storage, self._key, Published)
            return claim.version, etag
        except KeyNotFound:
            return 0, ""
        except DamagedObject as error:
            return 0, error.etag

    def _index_older(self) -> bool:
        """Write the claims of versions that an earlier release published; return whether that was necessary."""
        mark = f"models/{self._model}/published/complete"
        if self._storage.exists(mark):
            return False
        older = self._versions.all_versions(self._model)
        for version in older:
            key, claim = _claim_key(version.model, version.job, version.checkpoint), Published(version=version.version)
            with contextlib.suppress(Conflict):
                write_document(self._storage, key, claim.model_dump(mode="json"), if_absent=True)
        if older:
            self._storage.put(mark, b"")
        return bool(older)


def _claim_key(model: str, job: str, ref: CheckpointRef) -> str:
    return f"models/{model}/published/{job}.attempt-{ref.attempt}.step-{ref.step}.json"
