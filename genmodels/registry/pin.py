"""Names in a spec that may come to mean something else, replaced by what they mean when the job is submitted.

`data.dataset` of an added dataset gets its sha256. `train.init_from` becomes `model@3` (versions never change) or
`model@<job>:step-500`, and that checkpoint is marked, so that clean-up keeps it:

    runs/<job>/<model>/pins/step-00000500.json      which attempt's checkpoint of that step
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef
from genmodels.data import pin_data
from genmodels.errors import Conflict, DamagedObject, DataError, KeyNotFound, ModelNotFound, SpecError
from genmodels.registry.store import Registry
from genmodels.runs.jobs import newest_run
from genmodels.runs.store import Run
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage, list_names, load_document, write_document

CHECKPOINT = r"[a-z0-9-]{1,63}@([a-z0-9-]{1,72}:)?(live|step-[0-9]{1,9})"


class Pin(CheckpointRef):
    object_kind = "pin"
    remedy = "all checkpoints of that step are kept; delete it where no job starts from that checkpoint"


def pin(job: JobSpec, storage: Storage, *, mark: bool = True) -> JobSpec:
    """The job, with everything pinned; one that is pinned already stays as it is.

    Args:
        mark: keep the checkpoints it names from clean-up; not for one who only asks what would be.

    Raises:
        SpecError: a line for each name that means nothing in this storage.
    """
    return pin_initial(pin_datasets(job, storage), storage, mark=mark)


def pin_datasets(job: JobSpec, storage: Storage) -> JobSpec:
    """As `pin`, the added datasets alone."""

    def pinned(model: ModelSpec) -> ModelSpec:
        return model.model_copy(update={"data": pin_data(model.data, storage)})

    return _each(job, pinned)


def pin_initial(job: JobSpec, storage: Storage, *, mark: bool = True) -> JobSpec:
    """As `pin`, what training starts from alone."""

    def pinned(model: ModelSpec) -> ModelSpec:
        if model.train.init_from is None:
            return model
        update = {"init_from": resolve(model.train.init_from, storage, mark=mark)}
        return model.model_copy(update={"train": model.train.model_copy(update=update)})

    return _each(job, pinned)


def resolve(reference: str, storage: Storage, *, mark: bool = True) -> str:
    """What a version's or a checkpoint's name means now, as a name that goes on meaning it.

    Raises:
        SpecError: there is no such version or checkpoint.
    """
    try:
        if not names_checkpoint(reference):
            return Registry(storage).resolve(reference).name
        run, ref = find_checkpoint(reference, storage)
    except ModelNotFound as error:
        raise SpecError(f"train.init_from: {error}") from None
    if mark:
        with contextlib.suppress(Conflict):
            write_document(storage, _key(run, ref.step), ref.model_dump(), if_absent=True)
    if not storage.exists(f"{run.checkpoint_prefix(ref)}/{checkpoint.MANIFEST}"):  # clean-up came before the mark
        raise SpecError(f"train.init_from: {reference}: that checkpoint is gone; name another step or a version")
    return checkpoint_name(run, ref)


def marked(run: Run) -> list[CheckpointRef]:
    """Checkpoints of a run that specs are pinned to: clean-up keeps them.

    A damaged pin keeps the checkpoints of its step of all attempts: which one it meant is lost.
    """
    found: list[CheckpointRef] = []
    for name in list_names(run.storage, f"{run.prefix}/pins/", r"step-\d{8,9}\.json"):
        step = int(Path(name).stem.removeprefix("step-"))
        try:
            found += filter(None, [_marked(run, step)])
        except DamagedObject:
            found += [CheckpointRef(attempt=attempt, step=step) for attempt in run.attempts()]
    return found


def names_checkpoint(reference: str) -> bool:
    """Whether a name means a checkpoint of a run, as in `m@live`, `m@step-500`, `m@<job>:step-500`; else a version."""
    return re.fullmatch(CHECKPOINT, reference) is not None


def checkpoint_name(run: Run, ref: CheckpointRef) -> str:
    """The name that goes on meaning this checkpoint."""
    return f"{run.model}@{run.job}:step-{ref.step}"


def find_checkpoint(reference: str, storage: Storage) -> tuple[Run, CheckpointRef]:
    """The complete checkpoint that a name means; without a job, of the model's newest run.

    Raises:
        ModelNotFound: there is none; the message says what there is.
    """
    model, _, what = reference.partition("@")
    job, _, step = what.rpartition(":")
    found = job or newest_run(storage, model)
    if found is None:
        raise ModelNotFound(f"{reference}: no job has trained {model!r} in this storage")
    run = Run(storage, found, model)
    wanted = None if step == "live" else int(step.removeprefix("step-"))
    if wanted is not None and (known := _marked(run, wanted)):
        return run, known
    refs = run.checkpoints()
    ref = next((ref for ref in reversed(refs) if wanted in (None, ref.step)), None)
    if ref:
        return run, ref
    steps = ", ".join(str(ref.step) for ref in refs[-10:]) or "none yet"
    raise ModelNotFound(f"{reference}: no such checkpoint; those of {model} in job {run.job}: {steps}")


def _marked(run: Run, step: int) -> CheckpointRef | None:
    try:
        pinned, _ = load_document(run.storage, _key(run, step), Pin, step=step)
        return CheckpointRef(attempt=pinned.attempt, step=step)
    except KeyNotFound:
        return None


def _key(run: Run, step: int) -> str:
    return f"{run.prefix}/pins/step-{step:08d}.json"


def _each(job: JobSpec, pinned: Callable[[ModelSpec], ModelSpec]) -> JobSpec:
    models, problems = [], []
    for i, model in enumerate(job.models):
        try:
            models.append(pinned(model))
        except (SpecError, DataError) as error:
            problems.append(f"models[{i}].{error}")
    if problems:
        raise SpecError(*problems)
    return job.model_copy(update={"models": models})
