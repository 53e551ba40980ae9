"""Dry runs: what a job would run, without starting it: steps, workers, parameters, sizes, and whether it fits.

A dry run is quick and needs little memory: it counts networks without building them, and does not read datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from genmodels import models
from genmodels.data.facts import Facts, facts_of
from genmodels.errors import DataError, RequestError, SpecError
from genmodels.family import Family
from genmodels.preflight import parameters, servable, trainable
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage
from services.jobs.schemas import JobDryRun, ModelDryRun

BYTES_PER_VALUE = 4  # weights and optimizer states are kept in float32


def report(
    job: JobSpec,
    storage: Storage,
    capacity: Mapping[str, int] | None,
    pools: Mapping[str, int] | None = None,
    worker_memory: Mapping[str, int] | None = None,
    gone: Callable[[], bool] = lambda: False,
) -> JobDryRun:
    """Report what a job would run.

    Args:
        capacity: the largest number of `cpus` and `gpus` of the cluster; None: not known yet.
        pools: the bytes of models that a host keeps in memory, by pool of hosts, if known.
        worker_memory: the bytes of a machine on which a worker trains, by `cpus` (without a GPU) and `gpus`, if known.
        gone: return whether the client has disconnected.

    Raises:
        SpecError: a family does not fit its data.
        RequestError: the client has disconnected.
    """
    reports = []
    for place, spec in enumerate(job.models):
        if gone():
            raise RequestError("the client has disconnected", status=499)
        reports.append(_model(place, spec, storage, capacity, pools, worker_memory))
    return JobDryRun(name=job.name, priority=job.priority, models=reports)


def _model(
    place: int,
    spec: ModelSpec,
    storage: Storage,
    capacity: Mapping[str, int] | None,
    pools: Mapping[str, int] | None,
    worker_memory: Mapping[str, int] | None,
) -> ModelDryRun:
    scaling = spec.scaling
    report = ModelDryRun(
        model=spec.name,
        family=spec.family,
        dataset=spec.data.dataset or "",
        max_steps=spec.train.max_steps,
        batch_size=spec.train.batch_size,
        workers=(scaling.min_workers, scaling.max_workers),
        use_gpu=scaling.use_gpu,
        checkpoints_kept=spec.checkpoints.num_to_keep,
    )
    _check_capacity(report, capacity)
    try:
        facts = facts_of(spec.data, storage, open_all=False)
    except DataError as error:  # it was deleted after the check of the spec
        report.notes.append(str(error))
        return report
    try:
        family = models.load(spec.family)
        family.check(spec.model, facts.info)
    except SpecError as error:
        raise SpecError(f"models[{place}].{error}") from None
    _add_sizes(report, spec, family, facts, servable.budget(spec, pools))
    memory = trainable.memory_for(spec, worker_memory)
    if problem := trainable.refusal(spec, facts.info, memory, spec.world_sizes[0]):
        report.fits = False
        report.notes.append(problem)
    return report


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


def _add_sizes(report: ModelDryRun, spec: ModelSpec, cls: type[Family[Any, Any]], facts: Facts, budget: int) -> None:
    size = parameters.count(cls, spec.model, facts.info, spec.train)
    report.parameters = size.trained
    twice = size.served if spec.train.strategy == "fsdp2" and spec.train.ema is not None else 0  # whole, and in parts
    report.checkpoint_bytes = BYTES_PER_VALUE * (size.saved + twice)
    report.worker_bytes = BYTES_PER_VALUE * parameters.held(size, spec.train, spec.world_sizes[0])
    report.serving_bytes = cls.footprint(spec.model, facts.info).total
    too_large = servable.refusal(spec, facts.info, budget)
    report.servable = too_large is None
    if too_large:
        report.notes.append(too_large)
    report.samples, _ = facts.examples(size.window)
    report.epochs = round(report.max_steps * report.batch_size / report.samples, 2)
