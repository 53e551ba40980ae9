"""List stored objects that are no longer needed (`gc`), and remove them (`Plan.carry_out`).

`removal.py` deletes what a user names: versions, models and datasets.

`gc` keeps everything of open jobs, everything of a run that ended less than SPARED_SECONDS ago, the records of
ended jobs, and everything that a damaged object may name.
Other processes publish, resume and pin at the same time. Where they may need an object that is about to be deleted, a
comment at the deletion says why neither process loses anything.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from genmodels.checkpoint import MANIFEST, CheckpointRef
from genmodels.errors import (
    DamagedObject,
    GenmodelsError,
    JobNotFound,
    KeyNotFound,
    ModelNotFound,
    StorageError,
)
from genmodels.registry import references
from genmodels.registry.gate import best
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.runs.job_index import JOB_ID
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import ENDED
from genmodels.runs.store import Run
from genmodels.spec.names import LABEL
from genmodels.spec.sections import Gate
from genmodels.storage import Storage
from genmodels.storage.lease import Lease

SPARED_SECONDS = 3600.0
DELETING_SECONDS = (
    15.0  # for each time the lease is held: the last request ends before registry.GC_SECONDS, even on a slow store
)
BATCH = 200  # blobs for each time the lease is held
AT_ONCE = 8  # concurrent requests to the store

UNFINISHED = "an upload that never ended"


@dataclass(frozen=True)
class Item:
    key: str  # an object, or a folder, which ends in "/"
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """List the objects that `gc` would remove."""

    storage: Storage
    items: list[Item]

    def carry_out(self) -> None:
        """Remove the items, except items that are now in use.

        Raises:
            StorageUnavailable: the store is unavailable; the next `gc` finds the rest.
        """
        blobs: dict[str, list[str]] = {}
        checkpoints = []
        for item in self.items:
            where, name, *_ = item.key.split("/")
            if where == "open":
                Jobs(self.storage).forget(name)
            elif where == "models":
                blobs.setdefault(name, []).append(item.key)
            else:
                checkpoints.append(item)
        for model, keys in blobs.items():
            for i in range(0, len(keys), BATCH):
                remove_blobs(Registry(self.storage), model, keys[i : i + BATCH])
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda item: _remove_checkpoint(self.storage, item), checkpoints))


def gc(storage: Storage) -> Plan:
    """List files of no version, checkpoints that an ended run does not need, and submissions that never ended."""
    jobs, store = Jobs(storage), Registry(storage)
    is_open = jobs.open()
    models = [name for name in storage.folders("models/") if re.fullmatch(LABEL, name)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        by_job = threads.map(lambda job: _publishing(jobs, job, models), is_open)
        busy = {model for models_of_job in by_job for model in models_of_job}
        published: defaultdict[tuple[str, str], set[CheckpointRef]] = defaultdict(set)
        whole = dict(zip(models, threads.map(lambda model: _versions(store, model), models), strict=True))
        for version in (version for versions in whole.values() for version in versions or ()):
            published[version.job, version.model].add(version.checkpoint)
        spared = {model for model, versions in whole.items() if versions is None}
        ended = sorted({job for job in storage.folders("runs/") if re.fullmatch(JOB_ID, job)} - set(is_open))
        items = [
            *threads.map(lambda job: _submission(jobs, job), is_open),
            *threads.map(lambda model: _blobs(store, model), [model for model in models if model not in busy | spared]),
            *threads.map(lambda job: _checkpoints(jobs, job, published, spared), ended),
        ]
    return Plan(storage, [item for group in items for item in group])


@contextmanager
def alone(lease: Lease) -> Iterator[float]:
    """Hold a lease for deletion; yield the time, on the monotonic clock, until which the caller may delete."""
    while True:
        until = time.monotonic() + DELETING_SECONDS
        if lease.try_acquire() is not None:
            break
        time.sleep(0.2)
    try:
        yield until
    finally:
        lease.release()


# Submissions


def _submission(jobs: Jobs, job: str) -> list[Item]:
    try:
        entry = jobs.entry(job)
    except (JobNotFound, DamagedObject):
        return []
    if _age(entry.submitted) < SPARED_SECONDS or jobs.exists(job):
        return []
    return [Item(f"open/{job}", 0, "a submission that never ended")]


# Files of versions


def _blobs(registry: Registry, model: str) -> list[Item]:
    sizes = registry.storage.sizes(f"models/{model}/blobs/")
    named = _named(registry, model) if sizes else set()
    if named is None:
        return []
    return [Item(key, size, "a file of no version") for key, size in sizes.items() if key not in named]


def remove_blobs(registry: Registry, model: str, keys: list[str]) -> None:
    """Delete blobs of a model that no version names, as many as the time of the lease allows."""
    with alone(registry.gc_lease(model)) as until:
        # A process that publishes now has either written its version, which is read here, or checks its files after
        # the lease is released, and uploads the missing ones again.
        named = _named(registry, model)
        if named is None:
            return
        for key in keys:
            if key not in named and time.monotonic() < until:  # the next `gc` finds the rest
                registry.storage.delete(key)


def _named(registry: Registry, model: str) -> set[str] | None:
    """Return the files that versions name; None if a version is damaged, since it may name any file."""
    versions = _versions(registry, model)
    if versions is None:
        return None
    return {key for version in versions for key in registry.keys(version).values()}


def _versions(registry: Registry, model: str) -> list[Version] | None:
    """Return all versions; None if one of them is damaged."""
    versions = []
    for number in registry.versions(model):
        try:
            versions.append(registry.version(model, number))
        except ModelNotFound:  # deleted just now
            continue
        except DamagedObject:
            return None
    return versions


def _publishing(jobs: Jobs, job: str, models: list[str]) -> list[str]:
    """Return the models that a job is publishing, whose files are stored before their version.

    If the job cannot be read, return all models that it may be publishing.
    """
    try:
        models = jobs.entry(job).models
    except JobNotFound:
        return []
    except DamagedObject:
        return models
    return [model for model in models if _may_publish(Run(jobs.storage, job, model))]


def _may_publish(run: Run) -> bool:
    try:
        return run.status()[0].state == "publishing"
    except DamagedObject:
        return True


# Checkpoints


def _checkpoints(
    jobs: Jobs, job: str, published: Mapping[tuple[str, str], set[CheckpointRef]], spared: Collection[str]
) -> list[Item]:
    """Return the checkpoints of a closed job that can be deleted.

    Args:
        published: by job and model, the checkpoints that versions were published from.
        spared: models whose published checkpoints are not known.
    """
    items = []
    try:
        for model in jobs.spec(job).models:
            run = Run(jobs.storage, job, model.name)
            if model.name not in spared and _has_long_ended(run):
                items += _unneeded(run, model.serve.gate, published.get((job, model.name), set()))
    except StorageError:
        raise
    except GenmodelsError:  # damaged, of a newer release, or deleted just now: keep everything
        return []
    return items


def _has_long_ended(run: Run) -> bool:
    try:
        status, _ = run.status()
    except DamagedObject:
        return False
    return status.state in ENDED and bool(status.history) and _age(status.history[-1].time) >= SPARED_SECONDS


def _unneeded(run: Run, gate: Gate | None, named: set[CheckpointRef]) -> list[Item]:
    """Return all checkpoints except the newest, the best, the pinned ones and the ones in `named`."""
    chain, readable = run.checkpoints(), list(run.manifests())
    newest = (
        1 if run.status()[0].state == "succeeded" else 2
    )  # a run that is resumed may need the one before, if the newest is damaged
    keep = named | {ref for ref, _ in readable[-newest:]} | set(references.pinned_checkpoints(run))
    if readable:
        keep.add(best(gate, readable)[0])
    keep |= set(chain) - {ref for ref, _ in readable}  # damaged, or unreadable for a moment: keep
    items = []
    for folder, (ref, sizes) in _folders(run).items():
        if f"{folder}{MANIFEST}" not in sizes:
            why = UNFINISHED
        elif ref in keep:
            continue
        elif ref in chain:
            why = "neither the newest nor the best of a run that has ended"
        else:
            why = "written by an attempt after a newer attempt had started"
        items.append(Item(folder, sum(sizes.values()), why))
    return items


def _folders(run: Run) -> dict[str, tuple[CheckpointRef, dict[str, int]]]:
    """Return every checkpoint directory of a run: its key, its reference, and the sizes of its files."""
    folders: dict[str, tuple[CheckpointRef, dict[str, int]]] = {}
    for attempt in run.attempts():
        for key, size in run.storage.sizes(f"{run.prefix}/attempt-{attempt}/checkpoints/").items():
            match = re.match(r".*/checkpoints/step-(\d+)/", key)
            if match:
                ref = CheckpointRef(attempt=attempt, step=int(match[1]))
                folders.setdefault(match[0], (ref, {}))[1][key] = size
    return folders


def _remove_checkpoint(storage: Storage, item: Item) -> None:
    """Remove a checkpoint: the manifest first, so that no process starts to read a checkpoint that is being deleted."""
    _, job, model, *_ = item.key.split("/")
    run, manifest = Run(storage, job, model), f"{item.key}{MANIFEST}"
    if storage.exists(f"open/{job}") or not _has_long_ended(run):
        return  # resumed meanwhile
    try:
        data, _ = storage.get(manifest)
    except KeyNotFound:
        data = b""
    if data and item.why == UNFINISHED:
        return  # the upload has ended after all
    storage.delete(manifest)
    # A process that pins it now has either written its pin, which is read here, or looks for the manifest afterwards,
    # and sees that it is deleted.
    if data and any(f"{run.checkpoint_prefix(ref)}/" == item.key for ref in references.pinned_checkpoints(run)):
        storage.put(manifest, data, if_absent=True)
        return
    for key in storage.list(item.key):
        storage.delete(key)


def _age(moment: str) -> float:
    """Return the seconds since a moment."""
    return time.time() - datetime.fromisoformat(moment).timestamp()
