"""Read job specs of users (strict) and from storage (lenient), write them, and compute their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from genmodels.data import uploads
from genmodels.errors import SpecError
from genmodels.schema import yaml
from genmodels.schema.base import Section
from genmodels.schema.field_errors import format_errors
from genmodels.spec.sections import JobSpec, ModelSpec, sections_with_key
from genmodels.storage.documents import parse_object


def parse_spec(
    data: bytes,
    source: str,
    base: Path | None = None,
    datasets: Mapping[str, uploads.Kind] | None = None,
    *,
    paths: bool = True,
) -> JobSpec:
    """Parse a spec of a user, in YAML or JSON.

    Args:
        source: name of the document in messages, e.g. its file name.
        base: folder of a relative `data.path`; without it the path must be absolute.
        datasets: added datasets that the spec may name, e.g. `data.added.Kinds`.
        paths: whether the spec may name files; False for a spec from the network.

    Raises:
        SpecError: with a line `source:line: path: got ..., expected ...` for each problem.
    """
    document = yaml.read(data, source)
    context = {"base": base, "datasets": {} if datasets is None else datasets, "paths": paths}
    for outline in (True, False):  # problems that need no torch are reported first
        spec = _validate(document, source, {**context, "outline": outline})
    return spec


def load_stored(data: bytes) -> JobSpec:
    """Parse a spec from `dump`, possibly of another release: ignore unknown keys, do not check sections again.

    Raises:
        SpecError: the data is not a spec, or has values that this release does not know.
    """
    return _validate(_stored(data), "stored spec", {"stored": True})


def dump(spec: JobSpec) -> bytes:
    """Return the normalised spec as JSON: with every default and absolute paths.

    JSON is fast to read: a dispatcher that starts reads the specs of all open jobs, and YAML would take seconds.
    """
    return json.dumps(spec.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False).encode()


def digest(spec: JobSpec) -> str:
    """Return the sha256, in hex, of the meaning of a spec; the order of keys and written defaults do not change it."""
    return _sha256(spec)


def model_digest(model: ModelSpec) -> str:
    """Return the digest of the part of one model, as `digest` does."""
    return _sha256(model)


def job_id(spec: JobSpec) -> str:
    """Return `<name>-<8 hex>`, the same for the same spec."""
    return f"{spec.name}-{digest(spec)[:8]}"


def _stored(data: bytes) -> yaml.Document:
    try:
        return yaml.Document(parse_object(data), {(): 1})
    except ValueError as error:
        raise SpecError(f"stored spec: {error}") from None


def _validate(document: yaml.Document, source: str, context: dict[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(
            document.value, context=context, extra="ignore" if context.get("stored") else None
        )
    except ValidationError as error:
        problems = format_errors(error, JobSpec, lambda loc: sections_with_key(loc, document.value))
        raise document.error(source, problems, error.error_count()) from None


def _sha256(section: Section) -> str:
    return hashlib.sha256(json.dumps(section.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
