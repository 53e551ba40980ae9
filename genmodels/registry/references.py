"""Resolve references to models: `m`, `m@alias`, `m@3`, `m@latest`, `m@live`, `m@step-500`, `m@<job>:step-500`.

A reference names a version of the registry, or a checkpoint of a run, which may be in progress. `resolve_model` looks
up the files that can be loaded.

Most references may name something else later. So the references of a job are resolved when the job is submitted:
`data.dataset` of an added dataset gets its sha256, and `train.init_from` becomes `model@3` (versions never change) or
`model@<job>:step-500`. That checkpoint is pinned, so that clean-up keeps it:

    runs/<job>/<model>/pins/step-00000500.json      which attempt's checkpoint of that step
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, File, Metrics
from genmodels.data import resolve_data
from genmodels.errors import (
    CheckpointError,
    Conflict,
    DamagedObject,
    DataError,
    KeyNotFound,
    ModelNotFound,
    SpecError,
)
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.runs.job_index import newest_run
from genmodels.runs.store import Run
from genmodels.spec.names import CHECKPOINT_REFERENCE
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage, list_names, load_document, write_document


@dataclass(frozen=True)
class ResolvedModel:
    """Hold a version or a checkpoint whose files can be loaded. Two models with the same `name` are equal."""

    name: str  # exact, as in `shapes@3` or `shapes@study-0123abcd:step-500`
    model: str
    version: int | None
    job: str  # the job that trained it
    checkpoint: CheckpointRef  # in the run of that job
    family: str
    created: str
    metrics: Metrics
    files: dict[str, File]
    keys: dict[str, str]  # the storage key of each file

    @property
    def size(self) -> int:
        """Return the bytes of its files, a lower bound of the memory that it takes."""
        return sum(file.size for file in self.files.values())

    def fetch(self, storage: Storage, folder: Path) -> None:
        """Download its files into an empty folder and verify every byte.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        checkpoint.download(storage, self.keys, self.files, folder)


def is_mutable(reference: str) -> bool:
    """Return whether a reference may name something else later: an alias, `latest`, `live`, a step without a job."""
    return not reference.partition("@")[2].isdecimal() and ":step-" not in reference


def with_default_alias(reference: str) -> str:
    """Return the reference with the alias `production` where it has none."""
    return reference if "@" in reference else f"{reference}@production"


def is_checkpoint_reference(reference: str) -> bool:
    """Return whether a reference names a checkpoint, as in `m@live`, `m@step-500`, `m@<job>:step-500`."""
    return re.fullmatch(CHECKPOINT_REFERENCE, reference) is not None


def checkpoint_name(run: Run, ref: CheckpointRef) -> str:
    """Return the reference that always names this checkpoint."""
    return f"{run.model}@{run.job}:step-{ref.step}"


def resolve_model(storage: Storage, reference: str) -> ResolvedModel:
    """Look up the files of a version or a checkpoint.

    Raises:
        ModelNotFound: no such version or checkpoint; the message lists what exists.
    """
    if not is_checkpoint_reference(reference):
        registry = Registry(storage)
        return of_version(registry, registry.resolve(reference))
    run, ref = find_checkpoint(reference, storage)
    prefix = run.checkpoint_prefix(ref)
    try:
        manifest = run.manifest(ref)
        config, _ = storage.get(f"{prefix}/{checkpoint.CONFIG}")
    except KeyNotFound:
        raise ModelNotFound(f"{reference}: that checkpoint was cleaned up just now; ask for {run.model}@live") from None
    try:
        family = str(checkpoint.parse_config(config)["family"])
    except CheckpointError as error:
        raise CheckpointError(f"{prefix}/{error}") from None
    start = run.attempt_start(ref.attempt)
    files = checkpoint.serving_files(manifest.files)
    return ResolvedModel(
        name=checkpoint_name(run, ref),
        model=run.model,
        version=None,
        job=run.job,
        checkpoint=ref,
        family=family,
        created=start.time if start else "",
        metrics=manifest.metrics,
        files=files,
        keys={name: f"{prefix}/{name}" for name in files},
    )


def of_version(registry: Registry, version: Version) -> ResolvedModel:
    """Return a version of the registry as a model whose files can be loaded."""
    return ResolvedModel(
        name=version.name,
        model=version.model,
        version=version.version,
        job=version.job,
        checkpoint=version.checkpoint,
        family=version.family,
        created=version.created,
        metrics=version.metrics,
        files=version.files,
        keys=registry.keys(version),
    )


def find_checkpoint(reference: str, storage: Storage) -> tuple[Run, CheckpointRef]:
    """Return the complete checkpoint that a reference names; without a job, one of the model's newest run.

    Raises:
        ModelNotFound: no such checkpoint; the message lists the checkpoints that exist.
    """
    model, _, rest = reference.partition("@")
    job, _, position = rest.rpartition(":")
    job_id = job or newest_run(storage, model)
    if job_id is None:
        raise ModelNotFound(f"{reference}: no job has trained {model!r} in this storage")
    run = Run(storage, job_id, model)
    step = None if position == "live" else int(position.removeprefix("step-"))
    if step is not None and (pinned := _read_pin(run, step)):
        return run, pinned
    checkpoints = run.checkpoints()
    newest = next((ref for ref in reversed(checkpoints) if step in (None, ref.step)), None)
    if newest:
        return run, newest
    steps = ", ".join(str(ref.step) for ref in checkpoints[-10:]) or "none yet"
    raise ModelNotFound(f"{reference}: no such checkpoint; steps of {model} in job {run.job} with one: {steps}")


# References of a job


class Pin(CheckpointRef):
    """Pin a checkpoint: clean-up keeps it, because a spec refers to it."""

    object_kind = "pin"
    remedy = "all checkpoints of that step are kept; delete it if no job starts from that checkpoint"


def resolve_references(job: JobSpec, storage: Storage, *, pin: bool = True) -> JobSpec:
    """Return the job with all its references resolved; a job whose references are resolved does not change.

    Args:
        pin: keep the checkpoints that it refers to; False for a caller that only asks what a submission would do.

    Raises:
        SpecError: with a line for each reference to something that is not in this storage.
    """
    return resolve_init_from(resolve_datasets(job, storage), storage, pin=pin)


def resolve_datasets(job: JobSpec, storage: Storage) -> JobSpec:
    """Return the job with the sha256 of each added dataset. Raises SpecError as `resolve_references` does."""

    def resolved(model: ModelSpec) -> ModelSpec:
        return model.model_copy(update={"data": resolve_data(model.data, storage)})

    return _map_models(job, resolved)


def resolve_init_from(job: JobSpec, storage: Storage, *, pin: bool = True) -> JobSpec:
    """Return the job with each `train.init_from` resolved. Raises SpecError as `resolve_references` does."""

    def resolved(model: ModelSpec) -> ModelSpec:
        if model.train.init_from is None:
            return model
        update = {"init_from": resolve_reference(model.train.init_from, storage, pin=pin)}
        return model.model_copy(update={"train": model.train.model_copy(update=update)})

    return _map_models(job, resolved)


def resolve_reference(reference: str, storage: Storage, *, pin: bool = True) -> str:
    """Return the reference that always names the version or checkpoint which `reference` names now.

    Args:
        pin: keep the checkpoint that it refers to.

    Raises:
        SpecError: the version or checkpoint does not exist.
    """
    try:
        if not is_checkpoint_reference(reference):
            return Registry(storage).resolve(reference).name
        run, ref = find_checkpoint(reference, storage)
    except ModelNotFound as error:
        raise SpecError(f"train.init_from: {error}") from None
    if pin:
        with contextlib.suppress(Conflict):
            write_document(storage, _pin_key(run, ref.step), ref.model_dump(), if_absent=True)
    if not storage.exists(f"{run.checkpoint_prefix(ref)}/{checkpoint.MANIFEST}"):  # clean-up came before the pin
        raise SpecError(f"train.init_from: {reference}: that checkpoint was deleted; name another step or a version")
    return checkpoint_name(run, ref)


def pinned_checkpoints(run: Run) -> list[CheckpointRef]:
    """Return the checkpoints of a run that specs refer to: clean-up keeps them.

    A damaged pin has lost its attempt number, so it keeps the checkpoints at its step of every attempt.
    """
    pinned: list[CheckpointRef] = []
    for name in list_names(run.storage, f"{run.prefix}/pins/", r"step-\d{8,9}\.json"):
        step = int(Path(name).stem.removeprefix("step-"))
        try:
            pinned += filter(None, [_read_pin(run, step)])
        except DamagedObject:
            pinned += [CheckpointRef(attempt=attempt, step=step) for attempt in run.attempts()]
    return pinned


def _read_pin(run: Run, step: int) -> CheckpointRef | None:
    try:
        pin, _ = load_document(run.storage, _pin_key(run, step), Pin, step=step)
        return CheckpointRef(attempt=pin.attempt, step=step)
    except KeyNotFound:
        return None


def _pin_key(run: Run, step: int) -> str:
    return f"{run.prefix}/pins/step-{step:08d}.json"


def _map_models(job: JobSpec, resolve: Callable[[ModelSpec], ModelSpec]) -> JobSpec:
    models, problems = [], []
    for i, model in enumerate(job.models):
        try:
            models.append(resolve(model))
        except (SpecError, DataError) as error:
            problems.append(f"models[{i}].{error}")
    if problems:
        raise SpecError(*problems)
    return job.model_copy(update={"models": models})
