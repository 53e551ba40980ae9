"""Check, before training, that this machine has the memory to train a model and to save its checkpoints."""

from __future__ import annotations

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo
from genmodels.preflight import parameters
from genmodels.schema.base import Section
from genmodels.sizing.memory import FLOAT, Footprint, too_large
from genmodels.spec.sections import ModelSpec

PURPOSE = "to train (weights, gradients, optimizer, average, and the snapshot of a checkpoint), and this machine has"


def check(spec: ModelSpec, data: DataInfo, memory: int, on_cpu: bool = True) -> None:
    """Refuse a model whose first worker needs more memory than there is, activations not counted.

    Args:
        memory: bytes of this machine or container.
        on_cpu: False if only the snapshot lies in that memory, because a GPU trains.

    Raises:
        SpecError: the model is too large; the message names a setting and a value that fits.
    """
    excess = too_large(spec.model, lambda config: footprint(spec, config, data, on_cpu), memory, PURPOSE)
    if excess:
        raise SpecError(f"model.{excess[0]}: {excess[1]}")


def footprint(spec: ModelSpec, config: Section, data: DataInfo, on_cpu: bool = True) -> Footprint:
    """Compute the memory of the first worker of a run: a save adds one snapshot, and no copy of it."""
    count = parameters.count(models.load(spec.family), config, data, spec.train)
    training = count.trained + count.saved  # the gradients, and all that a checkpoint saves
    return Footprint(FLOAT * training * on_cpu, kept=FLOAT * count.saved)
