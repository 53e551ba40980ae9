"""Read versions and aliases: the truth of the registry, of which the catalogue is derived."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from pydantic import Field

from genmodels.checkpoint import CheckpointRef, File, Lineage, Metrics
from genmodels.errors import DamagedObject, KeyNotFound, ModelNotFound
from genmodels.registry.serving import Serving
from genmodels.runs.jobs import JobId
from genmodels.runs.records import GateResult
from genmodels.spec.names import LABEL
from genmodels.storage import Document, Storage, Time, list_names, load_document

NUMBERED, NAMED = r"\d{8}\.json", LABEL.removesuffix("$") + r"\.json"


class Version(Document):
    object_kind = "version"
    remedy = "restore it from a backup, or delete it and publish again: genmodels resume JOB, or a new job"

    model: str
    version: int
    family: str
    job: JobId
    checkpoint: CheckpointRef  # that it was published from
    metrics: Metrics
    gate: GateResult | None
    lineage: Lineage
    created: Time
    files: dict[str, File]
    serving: Serving | None = None  # None: published by a release that did not store it
    pool: str = "default"  # of model hosts, that it is meant for

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


class VersionReader:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def names(self) -> list[str]:
        """Return the names of all models, and of models that have runs but no version."""
        # Not the keys below the names: there are many blobs and runs.
        return [name for name in self.storage.folders("models/") if re.fullmatch(LABEL, name)]

    def models(self) -> list[str]:
        """Return the names of models that have a version."""
        return [
            name for name in self.names() if list_names(self.storage, f"models/{name}/versions/", NUMBERED, limit=1)
        ]

    def versions(self, model: str, after: int = 0) -> list[int]:
        """Return the numbers of the versions after one, including damaged ones, ascending."""
        start = f"{after:08d}.json" if after else ""
        names = list_names(self.storage, f"models/{model}/versions/", NUMBERED, after=start)
        return [int(Path(name).stem) for name in names]

    def all_versions(self, model: str) -> list[Version]:
        """Return all versions that can be read, the oldest first."""
        versions = []
        for number in self.versions(model):
            with contextlib.suppress(ModelNotFound, DamagedObject):  # ModelNotFound: deleted just now
                versions.append(self.version(model, number))
        return versions

    def version(self, model: str, number: int) -> Version:
        """Read a version.

        Raises:
            ModelNotFound: the version does not exist.
            DamagedObject: the document of the version is damaged.
        """
        try:
            return load_document(self.storage, version_key(model, number), Version, model=model, version=number)[0]
        except KeyNotFound:
            raise ModelNotFound(self._describe_missing(model, f"version {number}")) from None

    def alias_names(self, model: str) -> list[str]:
        """Return the names of the aliases of a model, including damaged ones."""
        return [Path(name).stem for name in list_names(self.storage, f"models/{model}/aliases/", NAMED)]

    def alias(self, model: str, name: str) -> Alias:
        """Read an alias.

        Raises:
            ModelNotFound: the alias does not exist.
            DamagedObject: the document of the alias is damaged.
        """
        try:
            return load_document(self.storage, alias_key(model, name), Alias)[0]
        except KeyNotFound:
            raise ModelNotFound(self._describe_missing(model, f"alias {name!r}")) from None

    def aliases(self, model: str) -> dict[str, Alias]:
        """Return all aliases that can be read, by name."""
        aliases = {}
        for name in self.alias_names(model):
            with contextlib.suppress(ModelNotFound, DamagedObject):
                aliases[name] = self.alias(model, name)
        return aliases

    def resolve(self, name: str) -> Version:
        """Return the version that a reference names: `m` (its alias production), `m@alias`, `m@3`, or `m@latest`.

        Raises:
            ModelNotFound: no such model, alias or version; the message lists what exists.
            DamagedObject: the alias or the version is damaged.
        """
        model, _, reference = name.partition("@")
        if not re.fullmatch(LABEL, model):
            raise ModelNotFound(f"no model {model!r}: a name has lower-case letters, digits and dashes")
        if "@" in name and not re.fullmatch(LABEL, reference):
            raise ModelNotFound(f"{name!r}: write an alias, a version number, or `latest` after @")
        if reference.isdecimal():
            return self.version(model, int(reference))
        if reference == "latest":
            return self._latest(model)
        return self.version(model, self.alias(model, reference or "production").version)

    def keys(self, version: Version) -> dict[str, str]:
        """Return the storage key of each file of a version."""
        return {name: blob_key(version.model, file.sha256) for name, file in version.files.items()}

    def evaluations_prefix(self, model: str, number: int) -> str:
        return f"models/{model}/evaluations/{number:08d}/"

    def _latest(self, model: str) -> Version:
        numbers = self.versions(model)
        if not numbers:
            raise ModelNotFound(self._describe_missing(model, "version"))
        return self.version(model, numbers[-1])

    def _describe_missing(self, model: str, missing: str) -> str:
        numbers = self.versions(model)
        if not numbers:
            # Name no other model: an API key may be limited to some models, and lists show only those.
            return f"no model {model!r}; `genmodels models` or GET /v1/models lists all models"
        aliases = ", ".join(self.alias_names(model)) or "none"
        return f"model {model!r} has no {missing}; aliases: {aliases}; versions: {', '.join(map(str, numbers))}"


def version_key(model: str, number: int) -> str:
    return f"models/{model}/versions/{number:08d}.json"


def deleted_key(model: str, number: int) -> str:
    return f"models/{model}/deleted/{number:08d}"


def alias_key(model: str, alias: str) -> str:
    return f"models/{model}/aliases/{alias}.json"


def blob_key(model: str, sha256: str) -> str:
    return f"models/{model}/blobs/{sha256}"
