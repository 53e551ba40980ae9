"""Read all documents in storage by their keys, and report damaged ones and unknown files.

Logs, metrics and the files of checkpoints and versions are not read: they are checked when they are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from genmodels.checkpoint import MANIFEST, Manifest, read_manifest
from genmodels.data.uploads import Current, StoredDataset
from genmodels.errors import CheckpointError, DamagedObject, JobNotFound, KeyNotFound, StorageError, contained
from genmodels.keys import Key
from genmodels.registry.catalogue import Head, Shard
from genmodels.registry.evaluations import EVALUATED, Evaluation
from genmodels.registry.publications import Published
from genmodels.registry.references import Pin
from genmodels.registry.store import Registry
from genmodels.registry.versions import Alias, Version
from genmodels.runs.job_index import JOB_ID, TIMED_NAME
from genmodels.runs.jobs import EndedEntry, Entry, Index, Jobs, StoredSpec, Submission
from genmodels.runs.parts import PART
from genmodels.runs.queue import Queue
from genmodels.runs.records import AttemptStart, Command, Heartbeat, Result, Status
from genmodels.spec.names import LABEL
from genmodels.storage import Document, Storage, load_document
from genmodels.storage.lease import LeaseDocument

READERS = 16  # concurrent reads

_LABEL = LABEL.strip("^$")
_JOB, _MODEL = f"(?P<job>{JOB_ID})", f"(?P<model>{_LABEL})"
_ATTEMPT = rf"runs/{JOB_ID}/{_LABEL}/attempt-(?P<attempt>\d+)"

# A named group of a pattern is a field of the document, which must have the same value.
DOCUMENTS: tuple[tuple[str, type[Document]], ...] = (
    (r"keys/(?P<id>[0-9a-f]{8})\.json", Key),
    (rf"jobs/{_JOB}/spec\.json", StoredSpec),
    (rf"jobs/{JOB_ID}/index\.json", Index),
    (rf"open/{_JOB}", Entry),
    (rf"ended/\d{{13}}-{_JOB}", EndedEntry),
    (r"idempotency/[0-9a-f]{64}\.json", Submission),
    (rf"dispatcher/lease\.json|(models|datasets)/{_LABEL}/gc-lease\.json", LeaseDocument),
    (r"dispatcher/queue\.json", Queue),
    (rf"runs/{JOB_ID}/{_LABEL}/status\.json", Status),
    (rf"runs/{JOB_ID}/{_LABEL}/commands/\d{{8}}\.json", Command),
    (rf"runs/{JOB_ID}/{_LABEL}/pins/step-(?P<step>\d{{8,9}})\.json", Pin),
    (rf"{_ATTEMPT}/start\.json", AttemptStart),
    (rf"runs/{JOB_ID}/{_LABEL}/attempt-\d+/heartbeat\.json", Heartbeat),
    (rf"runs/{JOB_ID}/{_LABEL}/attempt-\d+/result\.json", Result),
    (rf"runs/{JOB_ID}/{_LABEL}/attempt-\d+/checkpoints/step-\d+/{re.escape(MANIFEST)}", Manifest),
    (rf"models/{_MODEL}/versions/(?P<version>\d{{8}})\.json", Version),
    (rf"models/{_LABEL}/aliases/{_LABEL}\.json", Alias),
    (rf"models/{_LABEL}/published/{JOB_ID}\.attempt-\d+\.step-\d+\.json", Published),
    (r"catalogue/\d\d\.json", Shard),
    (r"catalogue/head\.json", Head),
    (rf"models/{_MODEL}/evaluations/(?P<version>\d{{8}})/{EVALUATED}", Evaluation),
    (rf"datasets/{_LABEL}/current\.json", Current),
    (rf"datasets/(?P<name>{_LABEL})/(?P<sha256>[0-9a-f]{{64}})/dataset\.json", StoredDataset),
)
_OTHERS = (
    rf"models/{_LABEL}/(blobs/[0-9a-f]{{64}}|deleted/\d{{8}}|published/complete|runs/{TIMED_NAME})",
    rf"runs/{JOB_ID}/{_LABEL}/attempt-\d+/(checkpoints|samples)/.+",
    rf"runs/{JOB_ID}/{_LABEL}/attempt-\d+/(metrics|logs/[^/]+(/\d{{13}}-[0-9a-f]{{8}})?)/{PART}",
    rf"dispatcher/notifications/{JOB_ID}/{_LABEL}/[0-9a-f]+",
    rf"catalogue/pending/({_LABEL}-[0-9a-f]{{16}}|head|\d\d)",
    rf"datasets/{_LABEL}/[0-9a-f]{{64}}/[^/]+",
    r"evaluation-cache/.+",
    rf"gc/({JOB_ID}/{_LABEL}/[0-9a-f]{{16}}|\.complete)",
    rf"dataset-users/({_LABEL}/{JOB_ID}|\.complete)",
)
FOLDERS = (
    "keys",
    "jobs",
    "open",
    "ended",
    "idempotency",
    "dispatcher",
    "runs",
    "models",
    "catalogue",
    "datasets",
    "dataset-users",
    "evaluation-cache",
    "gc",
)


@dataclass(frozen=True)
class Damage:
    key: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Inventory:
    documents: int
    damages: list[Damage]
    strays: list[str]  # keys in the folders of genmodels that have no known form


def take_inventory(storage: Storage) -> Inventory:
    """Read every document of a storage. Raises StorageError if the storage does not answer."""
    keys = [key for folder in FOLDERS for key in storage.list(f"{folder}/")]
    known = {key: kind for key in keys if (kind := kind_of(key))}
    with ThreadPoolExecutor(READERS) as threads:
        checked = threads.map(partial(_check, storage, frozenset(keys)), known.items())
        damages = [damage for damage in checked if damage]
    strays = [key for key in keys if key not in known and not _matches(_OTHERS, key)]
    return Inventory(len(known), damages, strays)


def kind_of(key: str) -> type[Document] | None:
    """Return the kind of document that a key names, None for any other key."""
    return next((kind for pattern, kind in DOCUMENTS if re.fullmatch(pattern, key)), None)


def _check(storage: Storage, keys: frozenset[str], item: tuple[str, type[Document]]) -> Damage | None:
    key, kind = item
    try:
        if kind is StoredSpec:
            Jobs(storage).spec(key.split("/")[1])
        elif kind is Manifest:
            read_manifest(storage, key.removesuffix(f"/{MANIFEST}"))
        else:
            document, _ = load_document(storage, key, kind, **_identity(key, kind))
            return next(_missing(storage, key, document, keys), None)
    except (KeyNotFound, JobNotFound):
        if key not in storage.list(key, limit=1):  # deleted in the meantime
            return None
        return Damage(key, "it is listed, but the object or file does not exist", "remove it")
    except DamagedObject as error:
        return Damage(key, error.what, error.remedy)
    except CheckpointError as error:
        return Damage(key, _after_key(str(error), key), Manifest.remedy)
    except StorageError as error:
        storage.list(key, limit=1)  # raises if the whole storage fails
        return Damage(key, str(error), "make it readable (owner, mode, disk) or restore it from a backup")
    except Exception as error:  # an error of this check: the other objects are still checked
        return Damage(key, str(contained(error)), kind.remedy)
    return None


def _identity(key: str, kind: type[Document]) -> dict[str, object]:
    pattern = next(pattern for pattern, of in DOCUMENTS if of is kind and re.fullmatch(pattern, key))
    match = re.fullmatch(pattern, key)
    named = match.groupdict() if match else {}
    numbers = ("version", "attempt", "step")
    return {name: int(value) if name in numbers else value for name, value in named.items()}


def _missing(storage: Storage, key: str, document: Document, keys: Iterable[str]) -> Iterator[Damage]:
    """Yield one entry for each object that a document names but the storage does not have."""
    if isinstance(document, Version):
        for name, blob in Registry(storage).keys(document).items():
            if blob not in keys:
                yield Damage(key, f"its file {name} is missing: {blob}", Version.remedy)
    if isinstance(document, Alias):
        model = key.split("/")[1]
        if f"models/{model}/versions/{document.version:08d}.json" not in keys:
            yield Damage(key, f"version {document.version} is missing", Alias.remedy)


def _after_key(message: str, key: str) -> str:
    return message.removeprefix(f"{key}: ").removeprefix("damaged (").partition(");")[0]


def _matches(patterns: Iterable[str], key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
