"""What a job would be, without starting it: steps, workers, parameters, sizes, and whether it fits the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

from pydantic import BaseModel

from genmodels import models
from genmodels.data import DataConfig, TextData, open_dataset, uploads
from genmodels.errors import DataError, RequestError, SpecError
from genmodels.family import DataInfo, Family
from genmodels.preflight import parameters, servable
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage

DATASET_SECONDS = 5.0  # for one plan to wait for built-in datasets that have to be fetched first
FLOAT = 4  # bytes; weights and optimizer states are kept in float32


class ModelPlan(BaseModel):
    """One model's training as it would be. What cannot be told is null, and a note says why."""

    model: str
    family: str
    dataset: str
    max_steps: int
    batch_size: int
    workers: tuple[int, int]  # fewest and most
    use_gpu: bool
    samples: int | None = None  # of the training data in an epoch
    epochs: float | None = None
    parameters: int | None = None  # of all its networks
    checkpoint_bytes: int | None = None  # of one: weights, what is served, optimizers
    serving_bytes: int | None = None  # of memory, where it is served
    servable: bool | None = None  # whether a model host has as much; a note says what would be right
    checkpoints_kept: int
    fits: bool | None = None  # its smallest worker group, into the cluster at its largest
    notes: list[str] = []


class JobPlan(BaseModel):
    name: str
    priority: int
    models: list[ModelPlan]


class Facts(BaseModel):
    """What must be known of a dataset."""

    info: DataInfo
    examples: int  # of the training data: pictures, or characters


class Planner:
    """Answers quickly and with little memory: networks are counted, not built, and datasets are opened once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._opening = ThreadPoolExecutor(1, "datasets")
        self._built_in: dict[str, Future[Facts]] = {}

    def plan(
        self, job: JobSpec, capacity: Mapping[str, int] | None, gone: Callable[[], bool] = lambda: False
    ) -> JobPlan:
        """The plan of a job.

        Args:
            capacity: the most `cpus` and `gpus` that the cluster has, as far as it is known.
            gone: whether the answer is wanted no more.

        Raises:
            SpecError: a family cannot work on its data.
            RequestError: it is wanted no more.
        """
        plans, until = [], time.monotonic() + DATASET_SECONDS
        for place, spec in enumerate(job.models):
            if gone():
                raise RequestError("the client has left", status=499)
            plans.append(self._model(place, spec, capacity, until))
        return JobPlan(name=job.name, priority=job.priority, models=plans)

    def _model(self, place: int, spec: ModelSpec, capacity: Mapping[str, int] | None, until: float) -> ModelPlan:
        scaling, dataset = spec.scaling, spec.data.dataset or ""
        plan = ModelPlan(
            model=spec.name,
            family=spec.family,
            dataset=dataset,
            max_steps=spec.train.max_steps,
            batch_size=spec.train.batch_size,
            workers=(scaling.min_workers, scaling.max_workers),
            use_gpu=scaling.use_gpu,
            checkpoints_kept=spec.checkpoints.num_to_keep,
        )
        _judge(plan, capacity)
        try:
            facts = self._facts(spec.data, until)
        except NotYet:
            plan.notes.append(f"{dataset} is being fetched: ask again for samples, parameters and sizes")
            return plan
        except DataError as error:
            plan.notes.append(str(error))
            return plan
        try:
            family = models.load(spec.family)
            family.check(spec.model, facts.info)
        except SpecError as error:
            raise SpecError(f"models[{place}].{error}") from None
        _measure(plan, spec, family, facts)
        return plan

    def _facts(self, data: DataConfig, until: float) -> Facts:
        assert data.dataset is not None
        if data.is_added:
            found = uploads.find(self._storage, data.dataset, data.sha256)
            return Facts(info=found.info, examples=found.examples - found.examples // 10)  # a tenth is for validation
        opening = self._built_in.get(data.dataset)
        if opening is None or (opening.done() and opening.exception()):
            opening = self._built_in[data.dataset] = self._opening.submit(_open, data)
        return opening.result(max(0.0, until - time.monotonic()))


def _open(data: DataConfig) -> Facts:
    dataset = open_dataset(data)
    examples = len(dataset.train) if isinstance(dataset, TextData) else len(dataset.split("train"))
    return Facts(info=dataset.info, examples=examples)


def _judge(plan: ModelPlan, capacity: Mapping[str, int] | None) -> None:
    what = "gpus" if plan.use_gpu else "cpus"
    if capacity is None:
        plan.notes.append("the cluster has not said yet how large it is")
        return
    least, has = plan.workers[0], capacity.get(what, 0)
    plan.fits = least <= has
    if not plan.fits:
        plan.notes.append(f"needs {least} {what.upper()[:-1]}s for its workers, and the cluster has {has} at most")


def _measure(plan: ModelPlan, spec: ModelSpec, cls: type[Family[Any, Any]], facts: Facts) -> None:
    size = parameters.count(cls, spec.model, facts.info, spec.train)
    plan.parameters = size.trained
    plan.checkpoint_bytes = FLOAT * size.saved
    plan.serving_bytes = cls.footprint(spec.model, facts.info).total
    refusal = servable.refusal(spec, facts.info)
    plan.servable = refusal is None
    if refusal:
        plan.notes.append(refusal)
    plan.samples = max(1, facts.examples // size.window - 1) if size.window else facts.examples
    plan.epochs = round(plan.max_steps * plan.batch_size / plan.samples, 2)
