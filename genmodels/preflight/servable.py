"""Whether a model host has the memory to serve a model: told from its spec, before it is queued, trained or built."""

from __future__ import annotations

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo
from genmodels.sizing.memory import HOST_MEMORY, too_large
from genmodels.spec.sections import ModelSpec


def check(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> None:
    """Refuse a model that no host can serve.

    Raises:
        SpecError: it is too large; names the setting, and what would be right.
    """
    if problem := refusal(spec, data, budget):
        raise SpecError(problem)


def refusal(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> str | None:
    """Why no host can serve a model; None where one can."""
    family = models.load(spec.family)
    try:
        found = too_large(spec.model, lambda config: family.footprint(config, data), budget)
    except Exception:  # it cannot be built for such data: whoever builds it says why
        return None
    return f"model.{found[0]}: {found[1]}" if found else None
