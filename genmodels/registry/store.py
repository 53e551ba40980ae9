"""Published models: immutable versions, and aliases that point at them.

    models/<model>/blobs/<sha256>               files of versions, each stored once
    models/<model>/versions/00000003.json       put-if-absent; one for each run and step
    models/<model>/aliases/<alias>.json         target and history; compare-and-swap
    models/<model>/evaluations/00000003/        what was measured of a version (`findings.py`); goes with it
    models/<model>/deleted/00000003             a number that is not given again
    models/<model>/sweep.json                   lease of whoever deletes versions or blobs

A version is a checkpoint's served files (not its optimizer state) and `probe.safetensors`: outputs for fixed inputs,
computed from the weights as saved, on the CPU in float32. A host computes them again and serves only what agrees.

Who deletes takes the model's lease first, then looks at what is named (a blob by a version, a version by an alias), and
deletes what is not. Who names a thing writes the name first, then waits until nobody holds that lease, and looks for
the thing again. So either the deleter sees the name, or the namer sees the deletion.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, TypeAdapter, ValidationError

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, File, Lineage, Manifest, Metrics
from genmodels.errors import CheckpointError, Conflict, DamagedObject, KeyNotFound, ModelNotFound, SpecError
from genmodels.metrics import PROMOTED, PUBLISHED
from genmodels.registry.probe import PROBE, write_probe
from genmodels.runs.jobs import JobId
from genmodels.runs.records import GateResult
from genmodels.runs.store import Run
from genmodels.spec.names import LABEL
from genmodels.spec.names import Alias as AliasName
from genmodels.storage import Document, Storage, Time, list_names, load_document, write_document
from genmodels.storage.documents import now
from genmodels.storage.lease import Lease

if TYPE_CHECKING:
    pass

NUMBERED, NAMED = r"\d{8}\.json", LABEL.removesuffix("$") + r"\.json"
SWEEP_SECONDS = 120.0  # after which one who deletes is taken for dead


class Version(Document):
    object_kind = "version"
    remedy = "restore it from a backup, or delete it and publish again: genmodels resume JOB, or a new job"

    model: str
    version: int
    family: str
    job: JobId
    checkpoint: CheckpointRef  # the checkpoint it was published from
    metrics: Metrics
    gate: GateResult | None
    lineage: Lineage
    created: Time
    files: dict[str, File]

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"


class Move(Document):
    version: int = Field(ge=1)
    time: str
    reason: str


class Alias(Document):
    object_kind = "alias"
    remedy = "set it anew: genmodels promote MODEL@VERSION ALIAS"

    version: int = Field(ge=1)
    history: list[Move] = Field(default_factory=list)


class Registry:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def models(self) -> list[str]:
        """Names of models that have a version."""
        names = self.storage.folders("models/")  # not what is in them: blobs and runs are many
        named = (name for name in names if re.fullmatch(LABEL, name))
        return [name for name in named if list_names(self.storage, f"models/{name}/versions/", NUMBERED, limit=1)]

    def versions(self, model: str) -> list[int]:
        """Numbers of the versions, also of damaged ones, ascending."""
        return [int(Path(name).stem) for name in list_names(self.storage, f"models/{model}/versions/", NUMBERED)]

    def all_versions(self, model: str) -> list[Version]:
        """All versions that can be read, the oldest first."""
        found = []
        for number in self.versions(model):
            with contextlib.suppress(ModelNotFound, DamagedObject):  # ModelNotFound: deleted just now
                found.append(self.version(model, number))
        return found

    def version(self, model: str, number: int) -> Version:
        """Read a version.

        Raises:
            ModelNotFound: there is none.
            DamagedObject
        """
        try:
            return load_document(self.storage, _version_key(model, number), Version, model=model, version=number)[0]
        except KeyNotFound:
            raise ModelNotFound(self._what_there_is(model, f"version {number}")) from None

    def alias_names(self, model: str) -> list[str]:
        """Names of a model's aliases, also of damaged ones."""
        return [Path(name).stem for name in list_names(self.storage, f"models/{model}/aliases/", NAMED)]

    def alias(self, model: str, name: str) -> Alias:
        """Where an alias stands.

        Raises:
            ModelNotFound: there is none.
            DamagedObject
        """
        try:
            return load_document(self.storage, _alias_key(model, name), Alias)[0]
        except KeyNotFound:
            raise ModelNotFound(self._what_there_is(model, f"alias {name!r}")) from None

    def aliases(self, model: str) -> dict[str, Alias]:
        """All aliases that can be read, by name."""
        found = {}
        for name in self.alias_names(model):
            with contextlib.suppress(ModelNotFound, DamagedObject):
                found[name] = self.alias(model, name)
        return found

    def resolve(self, name: str) -> Version:
        """The version a name means: `m` (its alias production), `m@alias`, `m@3`, or `m@latest`.

        Raises:
            ModelNotFound: there is none; the message says what there is.
            DamagedObject: of the alias or the version.
        """
        model, _, reference = name.partition("@")
        if not re.fullmatch(LABEL, model):
            raise ModelNotFound(f"no model {model!r}: names are lower-case letters, digits and dashes")
        if "@" in name and not re.fullmatch(LABEL, reference):
            raise ModelNotFound(f"{name!r}: after @ comes an alias, a version number, or `latest`")
        if reference.isdecimal():
            return self.version(model, int(reference))
        if reference == "latest":
            return self._latest(model)
        return self.version(model, self.alias(model, reference or "production").version)

    def publish(
        self, run: Run, ref: CheckpointRef, manifest: Manifest, folder: Path, gate: GateResult | None
    ) -> Version:
        """Make a checkpoint a version of the run's model; the same run and step again give the same version.

        Args:
            folder: the checkpoint's files, verified.
        """
        version = self._publish(run, ref, manifest, folder, gate)
        self.gc_lease(run.model).wait_until_free()
        there = set(self.storage.list(f"models/{run.model}/blobs/"))
        for name, key in self.keys(version).items():
            if key not in there:  # clean-up came before the version did
                self._restore(folder, name, version.files[name], key)
        return version

    def promote(self, model: str, alias: str, number: int, reason: str, *, forward_only: bool = False) -> Alias:
        """Point an alias at a version.

        Args:
            forward_only: leave the alias alone if it was ever at this version or a higher one, so that a publisher
                that runs again never undoes a person's rollback.

        Raises:
            ModelNotFound: there is no such version.
            DamagedObject: the version is damaged, or, with `forward_only`, the alias: where it ever was is lost.
        """
        check_alias(alias)
        version = self.version(model, number)
        while True:
            current: Alias | None = None
            etag: str | None = None
            try:
                current, etag = load_document(self.storage, _alias_key(model, alias), Alias)
            except KeyNotFound:
                pass
            except DamagedObject as error:
                if forward_only:
                    raise
                etag = error.etag  # set anew, with a history that begins here
            history = current.history if current else []
            highest = max((move.version for move in history), default=0)
            if current and (current.version == number or (forward_only and number <= highest)):
                return current
            moved = Alias(version=number, history=[*history, Move(version=number, time=now(), reason=reason)])
            body = moved.model_dump(mode="json")
            try:
                etag = write_document(self.storage, _alias_key(model, alias), body, if_absent=not etag, if_match=etag)
            except Conflict:
                continue  # somebody else moved it: look again
            self.gc_lease(model).wait_until_free()
            try:
                self.version(model, number)
            except ModelNotFound:
                self._take_back(model, alias, current, etag)
                raise
            PROMOTED.labels(version.family).inc()
            return moved

    def remove_alias(self, model: str, alias: str) -> None:
        """Remove an alias with its history. The version that it names stays.

        Raises:
            ModelNotFound: there is none.
        """
        check_alias(alias)
        if not self.storage.exists(_alias_key(model, alias)):
            raise ModelNotFound(self._what_there_is(model, f"alias {alias!r}"))
        self.storage.delete(_alias_key(model, alias))

    def gc_lease(self, model: str) -> Lease:
        """The lease of whoever deletes versions or blobs of a model."""
        return Lease(self.storage, SWEEP_SECONDS, f"models/{model}/sweep.json")

    def fetch(self, version: Version, folder: Path) -> None:
        """Download a version's files into an empty folder and verify every byte."""
        checkpoint.download(self.storage, self.keys(version), version.files, folder)

    def keys(self, version: Version) -> dict[str, str]:
        """Where a version's files lie in storage."""
        return {name: _blob_key(version.model, file.sha256) for name, file in version.files.items()}

    def evaluations_prefix(self, model: str, number: int) -> str:
        return f"models/{model}/evaluations/{number:08d}/"

    def delete_record(self, model: str, number: int) -> None:
        """Remove a version's document and what was measured of it.

        For `cleanup.delete_version`, which sees that nobody names it.
        """
        # First the mark that keeps the number from being given again: who publishes reads the versions before it.
        self.storage.put(_deleted_key(model, number), b"")
        self.storage.delete(_version_key(model, number))
        for key in self.storage.list(self.evaluations_prefix(model, number)):
            self.storage.delete(key)

    def _publish(
        self, run: Run, ref: CheckpointRef, manifest: Manifest, folder: Path, gate: GateResult | None
    ) -> Version:
        """Upload the files and write the version, if there is none."""
        model = run.model
        known, number = self._look(run, ref)
        if known:
            return known
        family = checkpoint.load_family(folder)
        write_probe(family, folder)
        files = checkpoint.served(checkpoint.describe_files(folder))
        for name, file in files.items():
            key = _blob_key(model, file.sha256)
            if not self.storage.exists(key):
                self.storage.upload(folder / name, key)
        while True:
            version = Version(
                model=model,
                version=number,
                family=family.family_name(),
                job=run.job,
                checkpoint=ref,
                metrics=manifest.metrics,
                gate=gate,
                lineage=manifest.lineage,
                created=now(),
                files=files,
            )
            document = version.model_dump(mode="json")
            try:
                write_document(self.storage, _version_key(model, number), document, if_absent=True)
                if not self.storage.exists(_deleted_key(model, number)):
                    PUBLISHED.labels(version.family).inc()
                    return version
                self.storage.delete(
                    _version_key(model, number)
                )  # the number was another's, who came and went meanwhile
            except Conflict:
                pass  # somebody else took the number, maybe to publish the same checkpoint
            known, number = self._look(run, ref)
            if known:
                return known

    def _look(self, run: Run, ref: CheckpointRef) -> tuple[Version | None, int]:
        """The version that was published from a checkpoint, if there is one, and the next free number."""
        versions = self.all_versions(run.model)
        known = next((version for version in versions if (version.job, version.checkpoint) == (run.job, ref)), None)
        numbers = self.versions(run.model)  # also of damaged ones: their numbers are taken
        # after the versions: it is written before they go
        numbers += map(int, list_names(self.storage, f"models/{run.model}/deleted/", r"\d{8}"))
        return known, max(numbers, default=0) + 1

    def _restore(self, folder: Path, name: str, file: File, key: str) -> None:
        if name == PROBE and not (folder / PROBE).exists():
            write_probe(checkpoint.load_family(folder), folder)
        path = folder / name
        if not path.exists() or checkpoint.sha256_of(path) != file.sha256:
            raise CheckpointError(f"{key}: missing, and {name} is another file now")
        self.storage.upload(path, key)

    def _take_back(self, model: str, alias: str, before: Alias | None, etag: str) -> None:
        """Undo a move to a version that was deleted meanwhile, unless somebody has moved the alias on."""
        key = _alias_key(model, alias)
        with contextlib.suppress(Conflict, KeyNotFound):
            if before:
                write_document(self.storage, key, before.model_dump(mode="json"), if_match=etag)
            elif self.storage.get(key)[1] == etag:
                self.storage.delete(key)

    def _latest(self, model: str) -> Version:
        numbers = self.versions(model)
        if not numbers:
            raise ModelNotFound(self._what_there_is(model, "version"))
        return self.version(model, numbers[-1])

    def _what_there_is(self, model: str, missing: str) -> str:
        numbers = self.versions(model)
        if not numbers:
            # Names no other model: a key may be limited to some, and is shown those alone where they are listed.
            return f"no model {model!r}; `genmodels models` or GET /v1/models lists what there is"
        aliases = ", ".join(self.alias_names(model)) or "none"
        return f"model {model!r} has no {missing}; aliases: {aliases}; versions: {', '.join(map(str, numbers))}"


def check_alias(alias: str) -> None:
    """Raise SpecError unless the name can be an alias: the rule is the spec's."""
    try:
        TypeAdapter(AliasName).validate_python(alias, strict=True)
    except ValidationError as error:
        raise SpecError(f"alias: {error.errors()[0]['msg']}") from None


def _version_key(model: str, number: int) -> str:
    return f"models/{model}/versions/{number:08d}.json"


def _deleted_key(model: str, number: int) -> str:
    return f"models/{model}/deleted/{number:08d}"


def _alias_key(model: str, alias: str) -> str:
    return f"models/{model}/aliases/{alias}.json"


def _blob_key(model: str, sha256: str) -> str:
    return f"models/{model}/blobs/{sha256}"
