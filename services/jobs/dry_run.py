"""Dry runs: what a job would run, without starting it: steps, workers, parameters, sizes, and whether it fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from pydantic import BaseModel

from genmodels import models
from genmodels.data import DataConfig, TextData, open_dataset, uploads
from genmodels.errors import DataError, RequestError, SpecError
from genmodels.family import DataInfo, Family
from genmodels.preflight import parameters, servable
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage
from services.jobs.schemas import JobDryRun, ModelDryRun

DATASET_SECONDS = 5.0  # that one dry run waits for built-in datasets to be downloaded
BYTES_PER_VALUE = 4  # weights and optimizer states are kept in float32


class DatasetFacts(BaseModel):
    """The facts of a dataset that a dry run needs."""

    info: DataInfo
    examples: int  # of the training data: pictures, or characters


class DryRunner:
    """Reports quickly and with little memory: networks are counted, not built, and datasets are opened once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._opening = ThreadPoolExecutor(1, "datasets")
        self._built_in: dict[str, Future[DatasetFacts]] = {}

    def report(
        self, job: JobSpec, capacity: Mapping[str, int] | None, gone: Callable[[], bool] = lambda: False
    ) -> JobDryRun:
        """Report what a job would run.

        Args:
            capacity: the largest number of `cpus` and `gpus` of the cluster; None: not known yet.
            gone: return whether the client has disconnected.

        Raises:
            SpecError: a family does not fit its data.
            RequestError: the client has disconnected.
        """
        reports, until = [], time.monotonic() + DATASET_SECONDS
        for place, spec in enumerate(job.models):
            if gone():
                raise RequestError("the client has disconnected", status=499)
            reports.append(self._model(place, spec, capacity, until))
        return JobDryRun(name=job.name, priority=job.priority, models=reports)

    def _model(self, place: int, spec: ModelSpec, capacity: Mapping[str, int] | None, until: float) -> ModelDryRun:
        scaling, dataset = spec.scaling, spec.data.dataset or ""
        report = ModelDryRun(
            model=spec.name,
            family=spec.family,
            dataset=dataset,
            max_steps=spec.train.max_steps,
            batch_size=spec.train.batch_size,
            workers=(scaling.min_workers, scaling.max_workers),
            use_gpu=scaling.use_gpu,
            checkpoints_kept=spec.checkpoints.num_to_keep,
        )
        _check_capacity(report, capacity)
        try:
            facts = self._facts(spec.data, until)
        except FutureTimeout:
            report.notes.append(f"{dataset} is being fetched: ask again for samples, parameters and sizes")
            return report
        except DataError as error:
            report.notes.append(str(error))
            return report
        try:
            family = models.load(spec.family)
            family.check(spec.model, facts.info)
        except SpecError as error:
            raise SpecError(f"models[{place}].{error}") from None
        _add_sizes(report, spec, family, facts)
        return report

    def _facts(self, data: DataConfig, until: float) -> DatasetFacts:
        assert data.dataset is not None
        if data.is_added:
            added = uploads.find(self._storage, data.dataset, data.sha256)
            validation = added.examples // 10
            return DatasetFacts(info=added.info, examples=added.examples - validation)
        opening = self._built_in.get(data.dataset)
        if opening is None or (opening.done() and opening.exception()):
            opening = self._built_in[data.dataset] = self._opening.submit(_open, data)
        return opening.result(max(0.0, until - time.monotonic()))


def _open(data: DataConfig) -> DatasetFacts:
    dataset = open_dataset(data)
    examples = len(dataset.train) if isinstance(dataset, TextData) else len(dataset.split("train"))
    return DatasetFacts(info=dataset.info, examples=examples)


def _check_capacity(report: ModelDryRun, capacity: Mapping[str, int] | None) -> None:
    device = "gpus" if report.use_gpu else "cpus"
    if capacity is None:
        report.notes.append("the size of the cluster is not known yet")
        return
    needed, available = report.workers[0], capacity.get(device, 0)
    report.fits = needed <= available
    if not report.fits:
        report.notes.append(
            f"needs {needed} {device.upper()[:-1]}s for its workers, and the cluster has {available} at most"
        )


def _add_sizes(report: ModelDryRun, spec: ModelSpec, cls: type[Family[Any, Any]], facts: DatasetFacts) -> None:
    size = parameters.count(cls, spec.model, facts.info, spec.train)
    report.parameters = size.trained
    report.checkpoint_bytes = BYTES_PER_VALUE * size.saved
    report.serving_bytes = cls.footprint(spec.model, facts.info).total
    too_large = servable.refusal(spec, facts.info)
    report.servable = too_large is None
    if too_large:
        report.notes.append(too_large)
    report.samples = max(1, facts.examples // size.window - 1) if size.window else facts.examples
    report.epochs = round(report.max_steps * report.batch_size / report.samples, 2)
