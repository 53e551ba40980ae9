"""Store the results of evaluations with the version that they evaluate.

models/<model>/evaluations/00000003/<id>.json    id: `publication`, or the time of the evaluation; put-if-absent
evaluation-cache/<name>.checked                  sha256, in hex, and what evaluations on one dataset share (`cached`)
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import secrets
from collections.abc import Callable

from pydantic import Field

from genmodels import __version__
from genmodels.errors import Conflict, DamagedObject, KeyNotFound
from genmodels.family import EvaluationMetric, EvaluationResult, Note
from genmodels.registry.versions import Version, VersionReader
from genmodels.storage import Document, Storage, Time, list_names, load_document
from genmodels.storage.documents import now

log = logging.getLogger(__name__)

PUBLICATION = "publication"
DIGEST_BYTES = 64
EVALUATED = r"(publication|\d{8}T\d{6}-[0-9a-f]{4})\.json"


class Evaluation(Document):
    object_kind = "evaluation"
    remedy = "delete it and evaluate again: genmodels evaluate MODEL@VERSION"

    model: str
    version: int
    id: str
    created: Time
    code_version: str
    data_digest: str
    thorough: bool
    seconds: float
    metrics: dict[str, EvaluationMetric] = Field(default_factory=dict)
    notes: dict[str, Note] = Field(default_factory=dict)


def new_evaluation(
    version: Version, result: EvaluationResult, *, thorough: bool, seconds: float, publication: bool
) -> Evaluation:
    """Return the result of an evaluation as it is stored."""
    created = now()
    return Evaluation(
        model=version.model,
        version=version.version,
        id=PUBLICATION if publication else f"{created[:19].replace(':', '').replace('-', '')}-{secrets.token_hex(2)}",
        created=created,
        code_version=__version__,
        data_digest=version.lineage.data_digest,
        thorough=thorough,
        seconds=seconds,
        **dict(result),
    )


def evaluations(registry: VersionReader, model: str, version: int) -> list[Evaluation]:
    """Return all evaluations of a version that can be read, the oldest first."""
    prefix, results = registry.evaluations_prefix(model, version), []
    for name in list_names(registry.storage, prefix, EVALUATED):
        with contextlib.suppress(KeyNotFound, DamagedObject):  # KeyNotFound: deleted just now
            results.append(load_document(registry.storage, prefix + name, Evaluation, model=model, version=version)[0])
    return sorted(results, key=lambda evaluation: evaluation.created)


def newest(registry: VersionReader, model: str, version: int) -> Evaluation | None:
    """Return the newest evaluation of a version that can be read."""
    prefix = registry.evaluations_prefix(model, version)
    names = sorted(list_names(registry.storage, prefix, EVALUATED), key=_second, reverse=True)
    for _, same_second in itertools.groupby(names, _second):  # not all are read: there may be many
        results = []
        for name in same_second:
            with contextlib.suppress(KeyNotFound, DamagedObject):  # KeyNotFound: deleted just now
                key = prefix + name
                results.append(load_document(registry.storage, key, Evaluation, model=model, version=version)[0])
        if results:
            return max(results, key=lambda evaluation: evaluation.created)
    return None


def _second(name: str) -> str:
    """Return the time in the name of an evaluation; "" for the one at publication, which is the oldest."""
    return "" if name.startswith(PUBLICATION) else name[:15]


def cached(storage: Storage, name: str, make: Callable[[], bytes]) -> bytes:
    """Return the bytes stored under a name; make and store them if they are missing or damaged.

    The first of several writers counts.
    """
    key, etag = f"evaluation-cache/{name}.checked", None
    with contextlib.suppress(KeyNotFound):
        stored, etag = storage.get(key)
        if (data := _checked(stored)) is not None:
            return data
        log.warning("%s is damaged; it is made again", key)
    data = make()
    try:
        storage.put(key, _digest(data) + data, if_absent=etag is None, if_match=etag)
    except Conflict:
        theirs = _checked(storage.get(key)[0])
        return data if theirs is None else theirs
    return data


def _checked(stored: bytes) -> bytes | None:
    """Return what was stored without its digest; None if it is damaged."""
    data = stored[DIGEST_BYTES:]
    return data if stored[:DIGEST_BYTES] == _digest(data) else None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
