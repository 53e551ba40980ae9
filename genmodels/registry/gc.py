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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import DamagedObject, JobNotFound, ModelNotFound
from genmodels.registry.gc_checkpoints import SPARED_SECONDS, Item, age, remove_checkpoint, run_garbage
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.runs.gc_marks import COMPLETE, RunId, mark, read_marks
from genmodels.runs.job_index import JOB_ID
from genmodels.runs.jobs import Jobs
from genmodels.runs.store import Run
from genmodels.spec.names import LABEL
from genmodels.storage import Storage
from genmodels.storage.lease import Lease

DELETING_SECONDS = (
    15.0  # for each time the lease is held: the last request ends before registry.GC_SECONDS, even on a slow store
)
BATCH = 200  # blobs for each time the lease is held
UPLOAD_SECONDS = 86_400.0  # after which an upload in parts cannot be in progress any more
LARGE = ("runs/", "models/", "datasets/")  # where large objects are; other keys may be those of other programs
AT_ONCE = 8  # concurrent requests to the store


@dataclass(frozen=True)
class Plan:
    """List the objects that `gc` would remove."""

    storage: Storage
    items: list[Item]
    finished: dict[RunId, list[str]]  # runs that need no further look when the items are removed, with their marks
    unmarked: list[RunId] | None  # runs to mark, if all runs were read; None: only marked runs were read

    def carry_out(self) -> None:
        """Remove the items, except items that are now in use.

        Raises:
            StorageUnavailable: the store is unavailable; the next `gc` finds the rest.
        """
        blobs: dict[str, list[str]] = {}
        checkpoints = []
        for item in self.items:
            where, name, *_ = item.key.split("/")
            if item.upload:
                self.storage.abort_upload(item.upload)
            elif where == "open":
                Jobs(self.storage).forget(name)
            elif where == "models":
                blobs.setdefault(name, []).append(item.key)
            else:
                checkpoints.append(item)
        left_models = {model for model, keys in blobs.items() if not self._remove_blobs(model, keys)}
        with ThreadPoolExecutor(AT_ONCE) as threads:
            removed = threads.map(lambda item: remove_checkpoint(self.storage, item), checkpoints)
            left = {_run_of(item) for item, done in zip(checkpoints, removed, strict=True) if not done}
        left |= {run for run in self.finished if run[1] in left_models}
        self._update_marks(left)

    def _remove_blobs(self, model: str, keys: list[str]) -> bool:
        batches = [keys[i : i + BATCH] for i in range(0, len(keys), BATCH)]
        done = [remove_blobs(Registry(self.storage), model, batch) for batch in batches]
        return all(done)

    def _update_marks(self, left: set[RunId]) -> None:
        """Remove the marks of the runs that are finished, but for the runs of which something is left."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            if self.unmarked is not None:
                unmarked = [*self.unmarked, *(run for run in left if not self.finished.get(run))]
                list(threads.map(lambda run: mark(self.storage, run[0], [run[1]]), unmarked))
                self.storage.put(COMPLETE, b"")
            keys = [key for run, keys in self.finished.items() if run not in left for key in keys]
            list(threads.map(self.storage.delete, keys))


def gc(storage: Storage, *, everything: bool = False) -> Plan:
    """List files of no version, checkpoints that no ended run needs, and uploads and submissions that never ended.

    It reads the open jobs, the runs that are marked (`gc_marks.py`), and the versions of their models. On a storage of
    an earlier release, which has no marks, it reads all runs and versions, as often as no plan is carried out.

    Args:
        everything: read all runs and versions. This also finds what a process left that died between a change and its
            mark, and what a paused process of a superseded attempt wrote after its run was finished.
    """
    jobs, store = Jobs(storage), Registry(storage)
    marks = read_marks(storage)  # before what they stand for
    everything = everything or not storage.exists(COMPLETE)
    is_open = jobs.open()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        runs = _all_runs(jobs, is_open, threads) if everything else set(marks)
        models = _all_models(storage) if everything else sorted({model for _, model in runs})
        by_job = threads.map(lambda job: _publishing(jobs, job, models), is_open if models else [])
        busy = {model for models_of_job in by_job for model in models_of_job}
        versions = dict(zip(models, threads.map(lambda model: _versions(store, model), models), strict=True))
        damaged = {model for model, known in versions.items() if known is None}
        published = _published(versions)
        closed = _by_job(runs, is_open)
        groups = threads.map(lambda job: run_garbage(jobs, job, closed[job], published, damaged), closed)
        garbage = [run for group in groups for run in group]
        items = [
            *threads.map(lambda job: _submission(jobs, job), is_open),
            *threads.map(lambda model: _blobs(store, model), [name for name in models if name not in busy | damaged]),
            *(run.items for run in garbage),
            _uploads(storage),
        ]
    finished = {(run.job, run.model) for run in garbage if run.finished and run.model not in busy | damaged}
    return Plan(
        storage,
        [item for group in items for item in group],
        {run: marks.get(run, []) for run in sorted(finished)},
        sorted(runs - finished - set(marks)) if everything else None,
    )


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


def _all_models(storage: Storage) -> list[str]:
    return [name for name in storage.folders("models/") if re.fullmatch(LABEL, name)]


def _all_runs(jobs: Jobs, is_open: list[str], threads: ThreadPoolExecutor) -> set[RunId]:
    """Return all runs that have stored anything, and those of open jobs."""
    storage = jobs.storage
    stored = [job for job in storage.folders("runs/") if re.fullmatch(JOB_ID, job)]
    models = threads.map(lambda job: storage.folders(f"runs/{job}/"), stored)
    runs = {(job, model) for job, names in zip(stored, models, strict=True) for model in names}
    for job, names in zip(is_open, threads.map(lambda job: _models_of(jobs, job), is_open), strict=True):
        runs |= {(job, model) for model in names}
    return runs


def _models_of(jobs: Jobs, job: str) -> list[str]:
    with suppress(JobNotFound, DamagedObject):
        return jobs.entry(job).models
    return []


def _by_job(runs: set[RunId], is_open: list[str]) -> dict[str, list[str]]:
    """Return the models of each closed job."""
    closed: defaultdict[str, list[str]] = defaultdict(list)
    for job, model in sorted(runs):
        if job not in is_open:
            closed[job].append(model)
    return dict(closed)


def _published(versions: Mapping[str, list[Version] | None]) -> Mapping[RunId, set[CheckpointRef]]:
    """Return the checkpoints that versions were published from, by run."""
    published: defaultdict[RunId, set[CheckpointRef]] = defaultdict(set)
    for version in (version for known in versions.values() for version in known or ()):
        published[version.job, version.model].add(version.checkpoint)
    return published


def _run_of(item: Item) -> RunId:
    _, job, model, *_ = item.key.split("/")
    return job, model


# Uploads in parts


def _uploads(storage: Storage) -> list[Item]:
    """Return the parts that a process left that ended during an upload, or whose request to remove them failed too."""
    uploads = storage.partial_uploads(UPLOAD_SECONDS)
    ours = [upload for upload in uploads if upload.key.startswith(LARGE)]
    return [Item(upload.key, upload.bytes, "parts of an upload that never ended", upload) for upload in ours]


# Submissions


def _submission(jobs: Jobs, job: str) -> list[Item]:
    try:
        entry = jobs.entry(job)
    except (JobNotFound, DamagedObject):
        return []
    if age(entry.submitted) < SPARED_SECONDS or jobs.exists(job):
        return []
    return [Item(f"open/{job}", 0, "a submission that never ended")]


# Files of versions


def _blobs(registry: Registry, model: str) -> list[Item]:
    sizes = registry.storage.sizes(f"models/{model}/blobs/")
    named = _named(registry, model) if sizes else set()
    if named is None:
        return []
    return [Item(key, size, "a file of no version") for key, size in sizes.items() if key not in named]


def remove_blobs(registry: Registry, model: str, keys: list[str]) -> bool:
    """Delete blobs of a model that no version names, as many as the time of the lease allows.

    Returns:
        False if some are left for the next `gc`.
    """
    with alone(registry.gc_lease(model)) as until:
        # A process that publishes now has either written its version, which is read here, or checks its files after
        # the lease is released, and uploads the missing ones again.
        named = _named(registry, model)
        if named is None:
            return False
        for key in keys:
            if time.monotonic() >= until:
                return False
            if key not in named:
                registry.storage.delete(key)
    return True


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
