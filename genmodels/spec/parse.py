"""TODO"""

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
from genmodels.schema.field_errors import FieldError, format_errors
from genmodels.spec.sections import JobSpec, ModelSpec, sections_with_key
from genmodels.storage.documents import parse_object


def read_spec(path: Path, datasets: Mapping[str, uploads.Kind] | None = None) -> JobSpec:
    """The spec in a person's file; a relative `data.path` in it is relative to the file's folder.

    Args:
        datasets: as `parse_spec` has them.

    Raises:
        SpecError: the file cannot be read, or is no sound spec.
    """
    return parse_spec(yaml.read_file(path), str(path), path.absolute().parent, datasets)


def parse_spec(
    data: bytes,
    source: str,
    base: Path | None = None,
    datasets: Mapping[str, uploads.Kind] | None = None,
    *,
    paths: bool = True,
) -> JobSpec:
    """The spec that a person wrote, in YAML or JSON.

    Args:
        source: what to call the document in messages, e.g. the file's name.
        base: the folder that a relative `data.path` is relative to; without one it must be absolute.
        datasets: the added datasets that it may name, as `data.stored.kinds` gives them.
        paths: whether it may name files at all: what comes over the network may not.

    Raises:
        SpecError: with a line `source:line: path: what was found, what would be right` for each problem.
    """
    document = yaml.read(data, source)
    context = {"base": base, "datasets": datasets or {}, "paths": paths}
    for outline in (True, False):  # what can be told without torch is told at once
        spec = _validate(document, source, {**context, "outline": outline})
    return spec


def load_stored(data: bytes) -> JobSpec:
    """Read a spec that `dump` wrote, maybe in another release: ignore unknown keys, do not check sections again.

    Raises:
        SpecError: it is not a spec, or holds values that this release does not know.
    """
    return _validate(_stored(data), "stored spec", {"stored": True})


def dump(spec: JobSpec) -> bytes:
    """Return the normalised spec as JSON: with every default and absolute paths.

    JSON is fast to read: a dispatcher that starts reads the specs of all open jobs, and YAML would take seconds.
    """
    return json.dumps(spec.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False).encode()


def digest(spec: JobSpec) -> str:
    """The sha256, in hex, of what the spec means: whatever the order of keys, and defaults written out or not."""
    return _sha256(spec)


def model_digest(model: ModelSpec) -> str:
    """As `digest`, of one model's part."""
    return _sha256(model)


def job_id(spec: JobSpec) -> str:
    """`<name>-<8 hex>`, the same for the same spec."""
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
        problems, more = (
            format_errors(error, JobSpec, lambda loc: sections_with_key(loc, document.value)),
            error.error_count(),
        )
    lines = sorted((_line(document, problem), f"{problem}") for problem in problems)
    said = [f"{source}:{line}: {text}" for line, text in lines]
    raise SpecError(*said, *([f"{source}: and {more - len(said)} more"] if more > len(said) else []))


def _line(document: yaml.Document, problem: FieldError) -> int:
    """The line of the nearest thing that is in the document."""
    ways_up = (problem.loc[:n] for n in range(len(problem.loc), -1, -1))
    return next(document.lines[loc] for loc in ways_up if loc in document.lines)


def _sha256(section: Section) -> str:
    return hashlib.sha256(json.dumps(section.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
