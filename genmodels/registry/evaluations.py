"""What evaluations found, kept with the version they were made of.

models/<model>/evaluations/00000003/<id>.json    `publication`, or the time it was made; put-if-absent
evaluation-cache/<name>                          what evaluations on one data set share (`EvaluationData.cached`)
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable

from pydantic import Field

from genmodels import __version__
from genmodels.errors import Conflict, DamagedObject, KeyNotFound, ModelNotFound
from genmodels.family import EvaluationMetric, EvaluationResult, Note
from genmodels.registry.store import Registry, Version
from genmodels.storage import Document, Storage, Time, list_names, load_document, write_document
from genmodels.storage.documents import now

PUBLICATION = "publication"
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


def record(
    registry: Registry,
    version: Version,
    findings: EvaluationResult,
    *,
    thorough: bool,
    seconds: float,
    publication: bool = False,
) -> Evaluation:
    """Keep what an evaluation of a version on its own data found; that at its publication only once.

    Raises:
        ModelNotFound: the version was deleted meanwhile.
    """
    created = now()
    evaluation = Evaluation(
        model=version.model,
        version=version.version,
        id=PUBLICATION if publication else f"{created[:19].replace(':', '').replace('-', '')}-{secrets.token_hex(2)}",
        created=created,
        code_version=__version__,
        data_digest=version.lineage.data_digest,
        thorough=thorough,
        seconds=seconds,
        **dict(findings),
    )
    key = f"{registry.evaluations_prefix(version.model, version.version)}{evaluation.id}.json"
    with contextlib.suppress(Conflict):
        write_document(registry.storage, key, evaluation.model_dump(mode="json"), if_absent=True)
    try:
        registry.version(version.model, version.version)
    except ModelNotFound:  # who deleted it may have looked before this was written
        registry.storage.delete(key)
        raise
    return evaluation


def evaluations(registry: Registry, model: str, version: int) -> list[Evaluation]:
    """All of a version that can be read, the oldest first."""
    prefix, found = registry.evaluations_prefix(model, version), []
    for name in list_names(registry.storage, prefix, EVALUATED):
        with contextlib.suppress(KeyNotFound, DamagedObject):  # KeyNotFound: deleted just now
            found.append(load_document(registry.storage, prefix + name, Evaluation, model=model, version=version)[0])
    return sorted(found, key=lambda evaluation: evaluation.created)


def newest(registry: Registry, model: str, version: int) -> Evaluation | None:
    found = evaluations(registry, model, version)
    return found[-1] if found else None


def cached(storage: Storage, name: str, make: Callable[[], bytes]) -> bytes:
    """What is stored under a name, made now if there is nothing: of several who make it the first one counts."""
    key = f"evaluation-cache/{name}"
    with contextlib.suppress(KeyNotFound):
        return storage.get(key)[0]
    data = make()
    try:
        storage.put(key, data, if_absent=True)
    except Conflict:
        return storage.get(key)[0]
    return data
