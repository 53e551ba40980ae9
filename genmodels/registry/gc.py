"""What nobody needs any more: found by `gc`, removed by `Plan.carry_out`. And the deletion of versions.

Whole models and datasets: `removal.py`.

Spared is everything of open jobs, all of a run that ended less than SPARED_SECONDS ago, and the ended jobs themselves;
and whatever a damaged object may name: it is not judged.
Processes go on publishing, resuming and pinning meanwhile; where they may want what is about to go, the comment at the
deletion says why neither loses anything.
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
from genmodels.registry.store import Registry, Version
from genmodels.runs.jobs import JOB_ID, Jobs
from genmodels.runs.records import ENDED
from genmodels.runs.store import Run
from genmodels.spec.names import LABEL
from genmodels.spec.sections import Gate
from genmodels.storage import Storage
from genmodels.storage.lease import Lease

SPARED_SECONDS = 3600.0
DELETING_SECONDS = 15.0  # at a time: its last request is over before registry.SWEEP_SECONDS are, however slow the store
BATCH = 200  # blobs in that time
AT_ONCE = 8  # requests to the store

UNFINISHED = "an upload that never ended"


@dataclass(frozen=True)
class Item:
    key: str  # an object, or a folder of them, which ends in "/"
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What `gc` found."""

    storage: Storage
    items: list[Item]

    def carry_out(self) -> None:
        """Remove the items, but for those that somebody has come to need.

        Raises:
            StorageUnavailable: the store went away; what is left another `gc` finds.
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
    """Look for what nobody needs: files of no version, checkpoints of no use to a run that ended, dead submissions."""
    jobs, store = Jobs(storage), Registry(storage)
    is_open = jobs.open()
    models = [name for name in storage.folders("models/") if re.fullmatch(LABEL, name)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        busy = {model for found in threads.map(lambda job: _publishing(jobs, job, models), is_open) for model in found}
        published: defaultdict[tuple[str, str], set[CheckpointRef]] = defaultdict(set)
        whole = dict(zip(models, threads.map(lambda model: _versions(store, model), models), strict=True))
        for version in (version for versions in whole.values() for version in versions or ()):
            published[version.job, version.model].add(version.checkpoint)
        spared = {model for model, versions in whole.items() if versions is None}
        ended = sorted({job for job in storage.folders("runs/") if re.fullmatch(JOB_ID, job)} - set(is_open))
        found = [
            *threads.map(lambda job: _submission(jobs, job), is_open),
            *threads.map(lambda model: _blobs(store, model), [model for model in models if model not in busy | spared]),
            *threads.map(lambda job: _checkpoints(jobs, job, published, spared), ended),
        ]
    return Plan(storage, [item for items in found for item in items])


def delete_version(registry: Registry, model: str, number: int) -> None:
    """Delete a version that no alias names. Its number is not given again; `gc` removes its files.

    Raises:
        ModelNotFound: there is none.
        GenmodelsError: an alias names it, or may name it, since it is damaged.
    """
    version = registry.version(model, number)
    with alone(registry.gc_lease(model)):
        # Who promotes it now either has moved his alias, and we see it here, or looks at the version when we have gone.
        for alias in registry.alias_names(model):
            if registry.alias(model, alias).version == number:  # a damaged one may name it, and raises
                remedy = f"point it at another version first: genmodels promote {model}@VERSION {alias}"
                raise GenmodelsError(f"alias {alias!r} names {version.name}; {remedy}")
        registry.delete_record(model, number)


def delete_versions(registry: Registry, model: str, numbers: list[int]) -> None:
    """Delete versions whatever names them, as many as there is time for."""
    with alone(registry.gc_lease(model)) as until:
        for number in numbers:
            if time.monotonic() < until:
                registry.delete_record(model, number)


@contextmanager
def alone(lease: Lease) -> Iterator[float]:
    """Hold the lease of what is deleted from; yields the time, by the monotonic clock, up to which to delete."""
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
    with alone(registry.gc_lease(model)) as until:
        # Who publishes now either has written his version, and we see it here, or looks at the files when we have gone.
        named = _named(registry, model)
        if named is None:
            return
        for key in keys:
            if key not in named and time.monotonic() < until:  # what is left another `gc` finds
                registry.storage.delete(key)


def _named(registry: Registry, model: str) -> set[str] | None:
    """Files that versions name; None where a version is damaged, which may name any."""
    versions = _versions(registry, model)
    if versions is None:
        return None
    return {key for version in versions for key in registry.keys(version).values()}


def _versions(registry: Registry, model: str) -> list[Version] | None:
    """All versions; None where one of them is damaged."""
    found = []
    for number in registry.versions(model):
        try:
            found.append(registry.version(model, number))
        except ModelNotFound:  # deleted just now
            continue
        except DamagedObject:
            return None
    return found


def _publishing(jobs: Jobs, job: str, models: list[str]) -> list[str]:
    """Those of all models that a job is publishing: their files come before their version.

    Where that cannot be read, those that it may be publishing.
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
    """Checkpoints that can go of a job that is not open.

    Args:
        published: by job and model, those that versions were published from.
        spared: models of which that is not known.
    """
    found = []
    try:
        for model in jobs.spec(job).models:
            run = Run(jobs.storage, job, model.name)
            if model.name not in spared and _has_long_ended(run):
                found += _unneeded(run, model.serve.gate, published.get((job, model.name), set()))
    except StorageError:
        raise
    except GenmodelsError:  # damaged, of a newer release, or deleted just now: not for us to judge
        return []
    return found


def _has_long_ended(run: Run) -> bool:
    try:
        status, _ = run.status()
    except DamagedObject:
        return False
    return status.state in ENDED and bool(status.history) and _age(status.history[-1].time) >= SPARED_SECONDS


def _unneeded(run: Run, gate: Gate | None, named: set[CheckpointRef]) -> list[Item]:
    """All but the newest, the best, what is pinned, and what is `named`."""
    chain, readable = run.checkpoints(), list(run.manifests())
    newest = 1 if run.status()[0].state == "succeeded" else 2  # who is resumed may find the newest damaged
    keep = named | {ref for ref, _ in readable[-newest:]} | set(references.pinned_checkpoints(run))
    if readable:
        keep.add(best(gate, readable)[0])
    keep |= set(chain) - {ref for ref, _ in readable}  # damaged, or away for a moment: not for us to judge
    items = []
    for folder, (ref, sizes) in _folders(run).items():
        if f"{folder}{MANIFEST}" not in sizes:
            why = UNFINISHED
        elif ref in keep:
            continue
        elif ref in chain:
            why = "neither the newest nor the best of a run that has ended"
        else:
            why = "written by an attempt that was overtaken"
        items.append(Item(folder, sum(sizes.values()), why))
    return items


def _folders(run: Run) -> dict[str, tuple[CheckpointRef, dict[str, int]]]:
    """Every checkpoint directory of a run: its key, its reference, and the sizes of its files."""
    found: dict[str, tuple[CheckpointRef, dict[str, int]]] = {}
    for attempt in run.attempts():
        for key, size in run.storage.sizes(f"{run.prefix}/attempt-{attempt}/checkpoints/").items():
            match = re.match(r".*/checkpoints/step-(\d+)/", key)
            if match:
                ref = CheckpointRef(attempt=attempt, step=int(match[1]))
                found.setdefault(match[0], (ref, {}))[1][key] = size
    return found


def _remove_checkpoint(storage: Storage, item: Item) -> None:
    """The manifest first, so that nobody begins to read what is about to go."""
    _, job, model, *_ = item.key.split("/")
    run, manifest = Run(storage, job, model), f"{item.key}{MANIFEST}"
    if storage.exists(f"open/{job}") or not _has_long_ended(run):
        return  # resumed meanwhile
    try:
        data, _ = storage.get(manifest)
    except KeyNotFound:
        data = b""
    if data and item.why == UNFINISHED:
        return  # it has ended after all
    storage.delete(manifest)
    # Who pins it now either has set his mark, and we see it here, or looks for the manifest after that, and it is gone.
    if data and any(f"{run.checkpoint_prefix(ref)}/" == item.key for ref in references.pinned_checkpoints(run)):
        storage.put(manifest, data, if_absent=True)
        return
    for key in storage.list(item.key):
        storage.delete(key)


def _age(moment: str) -> float:
    """Seconds since."""
    return time.time() - datetime.fromisoformat(moment).timestamp()
