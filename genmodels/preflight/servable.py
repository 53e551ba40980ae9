"""Check from a spec, before training, that a model host has the memory to serve a model."""

from __future__ import annotations

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo
from genmodels.sizing.memory import HOST_MEMORY, too_large
from genmodels.spec.sections import ModelSpec


def check(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> None:
    """Refuse a model that no host can serve.

    Raises:
        SpecError: the model is too large; the message names the setting and a value that fits.
    """
    if problem := refusal(spec, data, budget):
        raise SpecError(problem)


def refusal(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> str | None:
    """Return why no host can serve a model; None if a host can."""
    family = models.load(spec.family)
    try:
        excess = too_large(spec.model, lambda config: family.footprint(config, data), budget)
    except Exception:  # it cannot be built for such data: the code that builds it reports why
        return None
    return f"model.{excess[0]}: {excess[1]}" if excess else None
