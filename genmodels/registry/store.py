"""Publish versions, move aliases, and resolve both: the registry of models.

    models/<model>/blobs/<sha256>               files of versions, each stored once
    models/<model>/published/                   which number a run's checkpoint takes (`publications.py`)
    models/<model>/versions/00000003.json       put-if-absent; at most one for each run and step
    models/<model>/aliases/<alias>.json         target and history; compare-and-swap
    models/<model>/evaluations/00000003/        evaluations of a version (`evaluations.py`); deleted with it
    models/<model>/deleted/00000003             a number that is not used again
    models/<model>/gc-lease.json                lease of the process that deletes versions or blobs

A version has the serving files of a checkpoint (not its optimizer state) and `probe.safetensors`: outputs for fixed
inputs, computed from the saved weights on the CPU in float32. A host computes these outputs again and serves the
version only if they agree.

A process that deletes takes the lease of the model, then reads which objects are named (a blob by a version, a version
by an alias), and deletes the others. A process that names an object writes the name first, then waits until the lease
is free, and checks that the object still exists. So either the first process sees the name, or the second process sees
the deletion.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, File, Manifest
from genmodels.errors import CheckpointError, Conflict, DamagedObject, KeyNotFound, ModelNotFound, SpecError
from genmodels.family import EvaluationResult
from genmodels.metrics import PROMOTED, PUBLISHED
from genmodels.registry.catalogue import Catalogue
from genmodels.registry.evaluations import Evaluation, new_evaluation
from genmodels.registry.probe import PROBE, write_probe
from genmodels.registry.publications import Claim
from genmodels.registry.serving import describe_serving
from genmodels.registry.versions import (
    Alias,
    Move,
    Version,
    VersionReader,
    alias_key,
    blob_key,
    deleted_key,
    version_key,
)
from genmodels.runs.records import GateResult
from genmodels.runs.store import Run
from genmodels.spec.names import Alias as AliasName
from genmodels.storage import Storage, list_names, load_document, write_document
from genmodels.storage.documents import now
from genmodels.storage.lease import Lease

GC_SECONDS = 120.0  # after which a process that deletes counts as dead


class Registry(VersionReader):
    """Read and change versions and aliases; the catalogue follows each change."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.catalogue = Catalogue(storage)

    def publish(
        self,
        run: Run,
        ref: CheckpointRef,
        manifest: Manifest,
        folder: Path,
        gate: GateResult | None,
        pool: str = "default",
    ) -> Version:
        """Publish a checkpoint as a version of its model; the same run and step again give the same version.

        Args:
            folder: the files of the checkpoint, verified.
            pool: of model hosts, that the version is meant for.
        """
        version = self._publish(run, ref, manifest, folder, gate, pool)
        self.gc_lease(run.model).wait_until_free()
        for name, key in self.keys(version).items():
            if not self.storage.exists(key):  # clean-up deleted it before the version was written
                self._restore(folder, name, version.files[name], key)
        return version

    def promote(self, model: str, alias: str, number: int, reason: str, *, forward_only: bool = False) -> Alias:
        """Point an alias at a version.

        Args:
            forward_only: do not move an alias that ever named this version or a higher one, so that a publisher that
                runs again never undoes a rollback of the user.

        Raises:
            ModelNotFound: the version does not exist.
            DamagedObject: the version is damaged, or, with `forward_only`, the alias, whose history is then lost.
        """
        check_alias(alias)
        version = self.version(model, number)
        with self.catalogue.following(model):
            return self._promote(version, alias, reason, forward_only)

    def remove_alias(self, model: str, alias: str) -> None:
        """Remove an alias with its history. The version that it names stays.

        Raises:
            ModelNotFound: the alias does not exist.
        """
        check_alias(alias)
        if not self.storage.exists(alias_key(model, alias)):
            raise ModelNotFound(self._describe_missing(model, f"alias {alias!r}"))
        with self.catalogue.following(model):
            self.storage.delete(alias_key(model, alias))

    def record_evaluation(
        self,
        version: Version,
        result: EvaluationResult,
        *,
        thorough: bool,
        seconds: float,
        publication: bool = False,
    ) -> Evaluation:
        """Store the result of an evaluation of a version on its own data. The first result at publication stays.

        Raises:
            ModelNotFound: the version was deleted during the evaluation.
        """
        evaluation = new_evaluation(version, result, thorough=thorough, seconds=seconds, publication=publication)
        key = f"{self.evaluations_prefix(version.model, version.version)}{evaluation.id}.json"
        with self.catalogue.following(version.model):
            with contextlib.suppress(Conflict):
                write_document(self.storage, key, evaluation.model_dump(mode="json"), if_absent=True)
            try:
                self.version(version.model, version.version)
            except ModelNotFound:  # the process that deleted it may have listed evaluations before this write
                self.storage.delete(key)
                raise
        return evaluation

    def gc_lease(self, model: str) -> Lease:
        """Return the lease for deleting versions or blobs of a model."""
        return Lease(self.storage, GC_SECONDS, f"models/{model}/gc-lease.json")

    def fetch(self, version: Version, folder: Path) -> None:
        """Download the files of a version into an empty folder and verify every byte."""
        checkpoint.download(self.storage, self.keys(version), version.files, folder)

    def delete_record(self, model: str, number: int) -> None:
        """Remove the document and the evaluations of a version.

        `removal.delete_version` calls it after it has checked that no alias names the version.
        """
        # The mark that reserves the number comes first: a process that publishes reads the versions before the marks.
        with self.catalogue.following(model, removed=True):
            self.storage.put(deleted_key(model, number), b"")
            self.storage.delete(version_key(model, number))
            for key in self.storage.list(self.evaluations_prefix(model, number)):
                self.storage.delete(key)

    def _publish(
        self, run: Run, ref: CheckpointRef, manifest: Manifest, folder: Path, gate: GateResult | None, pool: str
    ) -> Version:
        """Upload the files and write the version, unless the checkpoint is already published."""
        claim = Claim(self, run.model, run.job, ref)
        if known := claim.version():
            return known
        family = checkpoint.load_family(folder)
        write_probe(family, folder)
        files = checkpoint.serving_files(checkpoint.describe_files(folder))
        for name, file in files.items():
            key = blob_key(run.model, file.sha256)
            if not self.storage.exists(key):
                self.storage.upload(folder / name, key)
        unnumbered = Version(
            model=run.model,
            version=0,
            family=family.family_name(),
            job=run.job,
            checkpoint=ref,
            metrics=manifest.metrics,
            gate=gate,
            lineage=manifest.lineage,
            created=now(),
            files=files,
            serving=describe_serving(family, folder),
            pool=pool,
        )
        while True:
            number = claim.take(lambda: self._free_number(run.model))
            if isinstance(number, Version):
                return number
            version = unnumbered.model_copy(update={"version": number})
            with self.catalogue.following(run.model):
                if self._write(version):
                    PUBLISHED.labels(version.family).inc()
                    return version

    def _write(self, version: Version) -> bool:
        """Write the document of a version; return False if another version has or had this number."""
        key = version_key(version.model, version.version)
        try:
            write_document(self.storage, key, version.model_dump(mode="json"), if_absent=True)
        except Conflict:
            return False  # another process took the number, maybe to publish the same checkpoint
        if not self.storage.exists(deleted_key(version.model, version.version)):
            return True
        self.storage.delete(key)  # another version had this number, and was deleted in the meantime
        return False

    def _free_number(self, model: str) -> int:
        """Return a number that no version has had."""
        latest = self.catalogue.latest(model)
        numbers = self.versions(model, after=latest)  # including damaged ones: their numbers are taken
        # Read the marks after the versions: a mark is written before its version is deleted.
        after = f"{latest:08d}" if latest else ""
        marks = list_names(self.storage, f"models/{model}/deleted/", r"\d{8}", after=after)
        return max([latest, *numbers, *map(int, marks)]) + 1

    def _promote(self, version: Version, alias: str, reason: str, forward_only: bool) -> Alias:
        model, number = version.model, version.version
        while True:
            current: Alias | None = None
            etag: str | None = None
            try:
                current, etag = load_document(self.storage, alias_key(model, alias), Alias)
            except KeyNotFound:
                pass
            except DamagedObject as error:
                if forward_only:
                    raise
                etag = error.etag  # write it again, with a history that begins here
            history = current.history if current else []
            highest = max((move.version for move in history), default=0)
            if current and (current.version == number or (forward_only and number <= highest)):
                return current
            moved = Alias(version=number, history=[*history, Move(version=number, time=now(), reason=reason)])
            body = moved.model_dump(mode="json")
            try:
                etag = write_document(self.storage, alias_key(model, alias), body, if_absent=not etag, if_match=etag)
            except Conflict:
                continue  # another process moved it: read it again
            self.gc_lease(model).wait_until_free()
            try:
                self.version(model, number)
            except ModelNotFound:
                self._take_back(model, alias, current, etag)
                raise
            PROMOTED.labels(version.family).inc()
            return moved

    def _restore(self, folder: Path, name: str, file: File, key: str) -> None:
        if name == PROBE and not (folder / PROBE).exists():
            write_probe(checkpoint.load_family(folder), folder)
        path = folder / name
        if not path.exists() or checkpoint.sha256_of(path) != file.sha256:
            raise CheckpointError(f"{key}: missing, and the local {name} is another file; publish it again")
        self.storage.upload(path, key)

    def _take_back(self, model: str, alias: str, before: Alias | None, etag: str) -> None:
        """Undo a move to a version that was just deleted, unless another process has moved the alias again."""
        key = alias_key(model, alias)
        with contextlib.suppress(Conflict, KeyNotFound):
            if before:
                write_document(self.storage, key, before.model_dump(mode="json"), if_match=etag)
            elif self.storage.get(key)[1] == etag:
                self.storage.delete(key)


def check_alias(alias: str) -> None:
    """Raise SpecError unless the name can be an alias, by the rule of job specs."""
    try:
        TypeAdapter(AliasName).validate_python(alias, strict=True)
    except ValidationError as error:
        raise SpecError(f"alias: {error.errors()[0]['msg']}") from None
