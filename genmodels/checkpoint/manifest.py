"""Define the manifest of a checkpoint, and read and write it: a manifest makes a checkpoint complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from genmodels.errors import CheckpointError, DamagedObject, KeyNotFound
from genmodels.storage import Document, Storage, encode_floats, write_document
from genmodels.storage.documents import damaged, parse_object

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class File(Document):
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CheckpointRef(Document):
    """Name a checkpoint of a run by its attempt and step."""

    attempt: int = Field(ge=0)
    step: int = Field(ge=0)


class Lineage(Document):
    """Record what a checkpoint was made from."""

    spec_digest: str
    data_digest: str
    code_version: str
    world_size: int
    parent: CheckpointRef | None  # the checkpoint that its attempt resumed from


# A metric may be NaN, which JSON cannot express: such values are stored as text.
Metrics = dict[str, Annotated[float, Field(allow_inf_nan=True)]]


class Manifest(Document):
    object_kind = "checkpoint"
    remedy = "the run resumes from another checkpoint; delete the folder of this one"

    step: int
    samples: int  # that all workers have seen together: the position in the data
    metrics: Metrics
    lineage: Lineage
    files: dict[str, File]


def serving_files(files: Mapping[str, File]) -> dict[str, File]:
    """Return the files that a model needs to answer requests, without those that only training needs."""
    return {name: file for name, file in files.items() if not name.startswith("state/")}


def write_manifest(storage: Storage, prefix: str, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose files are all in storage."""
    document = encode_floats(manifest.model_dump(mode="json"))
    write_document(storage, f"{prefix}/{MANIFEST}", {**document, "digest": _digest(document)})


def read_manifest(storage: Storage, prefix: str) -> Manifest:
    """Read the manifest of a checkpoint in storage.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    key = f"{prefix}/{MANIFEST}"
    try:
        data, etag = storage.get(key)
    except KeyNotFound:
        raise CheckpointError(f"{prefix}: no complete checkpoint (it has no {MANIFEST})") from None
    except DamagedObject as error:
        raise CheckpointError(str(damaged(key, error.what, Manifest, error.etag))) from None
    try:
        document = parse_object(data)
        written, _ = document.pop("digest"), document.pop("nonce")
        manifest = Manifest.model_validate(document)
        if written != _digest(document):
            raise ValueError("its digest does not match its content")
    except (ValueError, KeyError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else _summarize(error)
        raise CheckpointError(str(damaged(key, what, Manifest, etag))) from None
    return manifest


def _summarize(error: ValueError) -> str:
    return f"{error.error_count()} fields are wrong" if isinstance(error, ValidationError) else str(error)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
