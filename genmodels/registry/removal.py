"""Remove a version, a whole model, or a dataset with everything that belongs only to it.

The removal of a model leaves `models/<model>/deleted/`, so that no version number is used twice. It also leaves the
files of its runs (checkpoints, samples, logs), unless the caller asks to remove them. The removal of a dataset leaves
the models that were trained on it, with its digest in their lineage, and the copies in the caches of other machines.

The process may end at any moment. An object is removed after the objects that name it, so no half-removed object is
served or trained on, and a second call removes the rest.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from genmodels.checkpoint import MANIFEST
from genmodels.data import uploads
from genmodels.data.sources import cache_folder
from genmodels.errors import DamagedObject, DataError, GenmodelsError, ModelNotFound, StorageError
from genmodels.registry.gc import AT_ONCE, BATCH, alone, remove_blobs
from genmodels.registry.store import Registry
from genmodels.runs.dataset_users import dataset_users
from genmodels.runs.gc_marks import marked
from genmodels.runs.job_index import run_jobs
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import ACTIVE, ENDED
from genmodels.runs.store import Run
from genmodels.spec.names import LABEL
from genmodels.storage import Storage


@dataclass(frozen=True)
class ModelContents:
    """List what is stored of a model."""

    model: str
    versions: list[int]
    aliases: dict[str, int]
    bytes: int  # size of the files of its versions
    jobs: list[str]  # jobs whose runs left checkpoints, samples or logs

    @property
    def has_files(self) -> bool:
        """Return whether more of the model is stored than the files of its runs."""
        return bool(self.versions or self.aliases or self.bytes)


@dataclass(frozen=True)
class DatasetContents:
    """List what is stored of a dataset, and what was trained on it."""

    name: str
    contents: list[str]  # sha256 of each
    bytes: int
    digests: list[str]  # of the data, as in lineages
    runs: list[str]  # `job/model`, trained on it or to be trained on it
    versions: list[str]  # versions published from these runs that still exist


def delete_version(registry: Registry, model: str, number: int) -> None:
    """Delete a version that no alias names. Its number is not used again; `gc` removes its files.

    Raises:
        ModelNotFound: the version does not exist.
        GenmodelsError: an alias names the version, or a damaged alias may name it.
    """
    version = registry.version(model, number)
    with alone(registry.gc_lease(model)):
        # A process that promotes it now has either moved its alias, which is read here, or reads the version after
        # the lease is released, and sees that it is deleted.
        for alias in registry.alias_names(model):
            if registry.alias(model, alias).version == number:  # a damaged alias may name it, and raises
                remedy = f"point it at another version first: genmodels promote {model}@VERSION {alias}"
                raise GenmodelsError(f"alias {alias!r} names {version.name}; {remedy}")
        with marked(registry.storage, version.job, model):  # its files, and its checkpoint, may not be needed any more
            registry.delete_record(model, number)


def model_contents(storage: Storage, model: str) -> ModelContents:
    """Return what `delete_model` would remove.

    Raises:
        ModelNotFound: nothing is stored of the model.
    """
    if not re.fullmatch(LABEL, model):
        raise ModelNotFound(f"no model {model[:100]!r}: a name has lower-case letters, digits and dashes")
    registry = Registry(storage)
    versions, aliases = registry.versions(model), registry.aliases(model)
    sizes = storage.sizes(f"models/{model}/blobs/")
    jobs = run_jobs(storage, model)
    if not (versions or aliases or sizes or jobs or storage.list(f"models/{model}/evaluations/", limit=1)):
        raise ModelNotFound(f"no model {model!r}; `genmodels models` lists all models")
    targets = {name: alias.version for name, alias in aliases.items()}
    return ModelContents(model, versions, targets, sum(sizes.values()), jobs)


def delete_model(
    storage: Storage, model: str, *, with_runs: bool = False, may_name: Callable[[str], bool] = lambda _: True
) -> ModelContents:
    """Remove all aliases, versions, evaluations and files of a model; its next version gets the next number.

    Args:
        with_runs: remove checkpoints, samples and logs of its runs too. The specs and states of the jobs stay.
        may_name: return whether an error may name a job that trains this model.

    Returns:
        The contents before the deletion.

    Raises:
        ModelNotFound: nothing is stored of the model.
        GenmodelsError: a run that trains the model or starts from it is open.
    """
    registry, contents = Registry(storage), model_contents(storage, model)
    if contents.jobs and not with_runs and not contents.has_files:
        left = ", ".join(contents.jobs)
        raise ModelNotFound(
            f"model {model!r} has no version, only the files of its runs in jobs {left}; add --with-runs to delete them"
        )
    _refuse_while_open(storage, model, contents.jobs, may_name)
    for alias in contents.aliases:
        registry.remove_alias(model, alias)
    while numbers := registry.versions(model):
        _delete_versions(registry, model, numbers[:BATCH])
    while keys := storage.list(f"models/{model}/blobs/", limit=BATCH):
        remove_blobs(registry, model, keys)
        if registry.versions(model):  # published in the meantime: it is a new model
            break
    with alone(registry.gc_lease(model)):
        there = registry.versions(model)
        for key in storage.list(f"models/{model}/evaluations/"):
            if int(key.split("/")[3]) not in there:
                storage.delete(key)
        for name, target in registry.aliases(model).items():  # left by a process that died while it moved an alias
            if target.version not in there:
                registry.remove_alias(model, name)
    if with_runs:
        for job in contents.jobs:
            _remove_run(Run(storage, job, model))
    return contents


def dataset_contents(storage: Storage, name: str) -> DatasetContents:
    """Return what `delete_dataset` would remove, and what was trained on the dataset.

    Raises:
        DataError: nothing is stored of the dataset.
    """
    sizes = _dataset_sizes(storage, name)
    users = dataset_users(storage, name)
    registry, versions = Registry(storage), []
    for model in sorted({spec.name for _, spec in users}):
        jobs = {job for job, spec in users if spec.name == model}
        versions += [version for version in registry.all_versions(model) if version.job in jobs]
    digests = {dataset.digest for dataset in uploads.contents(storage, name)}
    return DatasetContents(
        name=name,
        contents=storage.folders(f"datasets/{name}/"),
        bytes=sum(sizes.values()),
        digests=sorted((digests | {version.lineage.data_digest for version in versions}) - {""}),
        runs=sorted(f"{job}/{spec.name}" for job, spec in users),
        versions=[version.name for version in versions],
    )


def delete_dataset(storage: Storage, name: str, *, may_name: Callable[[str], bool] = lambda _: True) -> DatasetContents:
    """Remove all contents of a dataset, the results that evaluations share, and its copies on this machine.

    Args:
        may_name: return whether an error may name a job that trains this model.

    Returns:
        The contents before the deletion, and what was trained on the dataset, which stays.

    Raises:
        DataError: nothing is stored of the dataset.
        GenmodelsError: an open job needs the dataset.
    """
    contents = dataset_contents(storage, name)
    open_jobs = set(Jobs(storage).open())
    for job, model in (run.split("/") for run in contents.runs):
        if _is_open(Run(storage, job, model), open_jobs):
            subject = _subject(job, model, may_name)
            raise GenmodelsError(f"{subject} needs dataset {name!r} and has not ended; cancel it first")
    with alone(uploads.gc_lease(storage, name)) as until:
        meaning, *rest = _dataset_sizes(storage, name)  # another process may have removed it in the meantime
        kept = [
            key for key in storage.list("evaluation-cache/") if any(digest[:16] in key for digest in contents.digests)
        ]
        for key in [meaning, *kept, *rest]:  # the data last, so that a second call finds the rest
            if time.monotonic() >= until:
                raise GenmodelsError(
                    f"dataset {name!r}: the storage is slow, and a part of it remains; run the command again"
                )
            storage.delete(key)
    for sha256 in contents.contents:
        shutil.rmtree(cache_folder() / "datasets" / sha256, ignore_errors=True)
    return contents


def _delete_versions(registry: Registry, model: str, numbers: list[int]) -> None:
    """Delete versions even if aliases name them, as many as the time of the lease allows."""
    with alone(registry.gc_lease(model)) as until:
        for number in numbers:
            if time.monotonic() < until:
                with _marked_run(registry, model, number):
                    registry.delete_record(model, number)


def _marked_run(registry: Registry, model: str, number: int) -> AbstractContextManager[None]:
    try:
        return marked(registry.storage, registry.version(model, number).job, model)
    except (ModelNotFound, DamagedObject):  # it does not tell which run it was published from
        return nullcontext()


def _dataset_sizes(storage: Storage, name: str) -> dict[str, int]:
    """Return the size of each object of a dataset; raise DataError if there is none."""
    if sizes := uploads.sizes(storage, name):
        return sizes
    raise DataError(f"no dataset {name!r}; `genmodels data list` lists all datasets")


def _refuse_while_open(storage: Storage, model: str, jobs: Iterable[str], may_name: Callable[[str], bool]) -> None:
    open_jobs = Jobs(storage).open()
    for job in dict.fromkeys([*jobs, *open_jobs]):
        try:
            spec = Jobs(storage).spec(job)
        except StorageError:
            raise
        except GenmodelsError:  # half submitted, deleted just now, or damaged: no run uses it
            continue
        for entry in spec.models:
            source = (entry.train.init_from or "").partition("@")[0]
            if model in (entry.name, source) and _is_open(Run(storage, job, entry.name), set(open_jobs)):
                does = "trains it" if entry.name == model else "starts from it"
                remedy = "cancel it first" if job in open_jobs else "end its `genmodels run` first"
                subject = _subject(job, entry.name, may_name)
                raise GenmodelsError(f"model {model!r}: {subject} {does} and has not ended; {remedy}")


def _subject(job: str, model: str, may_name: Callable[[str], bool]) -> str:
    return f"job {job}" if may_name(model) else "a job of models that this key may not use"


def _is_open(run: Run, open_jobs: set[str]) -> bool:
    """Return whether a run has not ended; without a dispatcher (`genmodels run`), whether it is active."""
    state = run.status()[0].state
    return state not in ENDED if run.job in open_jobs else state in ACTIVE


def _remove_run(run: Run) -> None:
    """Remove the files of the attempts of a run: the newest attempt first, its manifests and its start before the rest.

    So a reader sees a history that ends one attempt earlier, and no incomplete checkpoint.
    """
    storage = run.storage
    for attempt in reversed(run.attempts()):
        keys = storage.list(f"{run.prefix}/attempt-{attempt}/")
        first = [key for key in keys if key.endswith(f"/{MANIFEST}")]
        first += [key for key in keys if key.endswith(f"/attempt-{attempt}/start.json")]
        for key in first:
            storage.delete(key)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(storage.delete, [key for key in keys if key not in first]))
    for key in storage.list(f"{run.prefix}/pins/"):
        storage.delete(key)
    for key in storage.list(f"models/{run.model}/runs/"):  # last, so that a second call finds this run
        if re.fullmatch(rf".*/\d+-{re.escape(run.job)}", key):
            storage.delete(key)
