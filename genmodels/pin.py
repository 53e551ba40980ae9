"""Names in a spec that may come to mean something else, replaced by what they mean when the job is submitted.

`data.dataset` of an added dataset gets its sha256. `train.init_from` becomes `model@3` (versions never change) or
`model@<job>:step-500`, and that checkpoint is marked, so that clean-up keeps it:

    runs/<job>/<model>/pins/step-00000500.json      which attempt's checkpoint of that step
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from genmodels import checkpoint
from genmodels.checkpoint import Place
from genmodels.data import pin_data
from genmodels.errors import Conflict, DataError, KeyNotFound, ModelNotFound, SpecError
from genmodels.job import newest_run
from genmodels.registry import Registry
from genmodels.run import Run
from genmodels.spec import JobSpec, ModelSpec
from genmodels.storage import Storage, read_document, write_document


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
    model, _, what = reference.partition("@")
    job, _, step = what.rpartition(":")
    if step != "live" and not step.startswith("step-"):
        try:
            return Registry(storage).resolve(reference).name
        except ModelNotFound as error:
            raise SpecError(f"train.init_from: {error}") from None
    run = _run(storage, model, job, reference)
    place = _place(run, None if step == "live" else int(step.removeprefix("step-")), reference)
    if mark:
        with contextlib.suppress(Conflict):
            write_document(storage, _key(run, place.step), place.model_dump(), if_absent=True)
    if not storage.exists(f"{run.checkpoint_prefix(place)}/{checkpoint.MANIFEST}"):  # clean-up came before the mark
        raise SpecError(f"train.init_from: {reference}: that checkpoint is gone; name another step or a version")
    return f"{model}@{run.job}:step-{place.step}"


def marked(run: Run) -> list[Place]:
    """Checkpoints of a run that specs are pinned to: clean-up keeps them."""
    keys = run.storage.list(f"{run.prefix}/pins/")
    return [Place.model_validate(read_document(run.storage, key)[0]) for key in keys]


def place_of(reference: str, storage: Storage) -> tuple[Run, Place]:
    """The checkpoint that a pinned `model@<job>:step-500` names."""
    model, _, what = reference.partition("@")
    job, _, step = what.partition(":")
    run = Run(storage, job, model)
    return run, _place(run, int(step.removeprefix("step-")), reference)


def _run(storage: Storage, model: str, job: str, reference: str) -> Run:
    found = job or newest_run(storage, model)
    if found is None:
        raise SpecError(f"train.init_from: {reference}: no job has trained {model!r} in this storage")
    return Run(storage, found, model)


def _place(run: Run, step: int | None, reference: str) -> Place:
    """The checkpoint of a step, None for the newest."""
    if step is not None and (known := _marked(run, step)):
        return known
    places = run.checkpoints()
    found = next((place for place in reversed(places) if step in (None, place.step)), None)
    if found:
        return found
    steps = ", ".join(str(place.step) for place in places[-10:]) or "none yet"
    raise SpecError(f"train.init_from: {reference}: no such checkpoint; those of {run.model} in job {run.job}: {steps}")


def _marked(run: Run, step: int) -> Place | None:
    try:
        return Place.model_validate(read_document(run.storage, _key(run, step))[0])
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
