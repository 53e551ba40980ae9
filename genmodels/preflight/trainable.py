"""Check, before training, that a worker's machine has the memory to train a model and to save its checkpoints.

A submission is checked with the memory that the cluster has told of its workers, an attempt with the memory that there
is where its first worker runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo
from genmodels.preflight import parameters
from genmodels.schema.base import Section
from genmodels.sizing.memory import FLOAT, HOST_MEMORY, Footprint, too_large
from genmodels.spec.sections import ModelSpec

PURPOSE = "to train (weights, gradients, optimizer, average, and the snapshot of a checkpoint), and a worker has"


def check(spec: ModelSpec, data: DataInfo, memory: int | None, workers: int) -> None:
    """Refuse a model whose first worker needs more memory than there is; see `refusal`.

    Raises:
        SpecError: the model is too large; the message names a setting and a value that fits.
    """
    if problem := refusal(spec, data, memory, workers):
        raise SpecError(problem)


def refusal(spec: ModelSpec, data: DataInfo, memory: int | None, workers: int) -> str | None:
    """Return why a worker has too little memory to train a model; None if it has enough, or if that is not known.

    Activations are not counted.

    Args:
        memory: bytes of the machine or container in which the first worker runs, if known.
        workers: the size of the worker group.
    """
    if memory is None or (
        memory >= HOST_MEMORY and models.declaration(spec.family).surely_fits(spec.model, data)
    ):  # no model that is known to fit a host takes more to train, either
        return None
    excess = too_large(spec.model, lambda config: footprint(spec, config, data, workers), memory, PURPOSE)
    if not excess:
        return None
    more_workers = "; or raise scaling.num_workers: the workers share it" * (spec.train.strategy == "fsdp2")
    return f"model.{excess[0]}: {excess[1]}{more_workers}"


def memory_for(spec: ModelSpec, worker_memory: Mapping[str, int] | None) -> int | None:
    """Return the bytes that the machines of a run's workers have, from those by `cpus` and `gpus`; None: not known."""
    return (worker_memory or {}).get("gpus" if spec.scaling.use_gpu else "cpus")


def footprint(spec: ModelSpec, config: Section, data: DataInfo, workers: int = 1) -> Footprint:
    """Compute the memory of the first worker of a run: a save adds one snapshot, and no copy of it.

    Where GPUs train, only the snapshot lies in the memory of the machine. With `strategy: fsdp2` the first worker holds
    the whole model for a moment, when it draws the initial weights.
    """
    on_cpu = not spec.scaling.use_gpu
    count = parameters.count(models.load(spec.family), config, data, spec.train)
    snapshot = parameters.snapshot(count, spec.train, workers)
    training = parameters.held(count, spec.train, workers) * on_cpu + snapshot
    if spec.train.strategy == "ddp" or workers == 1:
        return Footprint(FLOAT * training)
    shares = count.saved + (count.trained + count.served) * on_cpu  # a checkpoint that was read, weights, average
    initial = count.trained + math.ceil(shares / workers)
    return Footprint(FLOAT * max(training, initial))
