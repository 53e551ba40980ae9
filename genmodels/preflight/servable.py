"""Check from a spec, before training, that a model host has the memory to serve a model."""

from __future__ import annotations

from collections.abc import Mapping

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo, TextInfo
from genmodels.schema.field_errors import nearest
from genmodels.sizing.memory import HOST_MEMORY, gibibytes, too_large
from genmodels.spec.sections import ModelSpec


def budget(spec: ModelSpec, pools: Mapping[str, int] | None) -> int:
    """Return the bytes of models that a host of the model's pool keeps in memory.

    Args:
        pools: those bytes by pool; None: the pools are not known.

    Raises:
        SpecError: there is no such pool; the message lists the pools.
    """
    pool = spec.serve.pool
    if pools is None:
        return HOST_MEMORY
    if pool not in pools:
        raise SpecError(f"serve.pool: got {pool!r}, expected one of {', '.join(pools)}{nearest(pool, pools)}")
    return pools[pool]


def check(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> None:
    """Refuse a model that no host can serve.

    Raises:
        SpecError: the model is too large; the message names the setting and a value that fits.
    """
    if problem := refusal(spec, data, budget):
        raise SpecError(problem)


def refusal(spec: ModelSpec, data: DataInfo, budget: int = HOST_MEMORY) -> str | None:
    """Return why no host can serve a model; None if a host can."""
    if budget >= HOST_MEMORY and models.declaration(spec.family).surely_fits(spec.model, data):
        return None
    family = models.load(spec.family)
    try:
        excess = too_large(spec.model, lambda config: family.footprint(config, data), budget)
        if excess and isinstance(data, TextInfo) and (problem := _large_vocabulary(spec, data, budget)):
            return problem
    except Exception:  # it cannot be built for such data: the code that builds it reports why
        return None
    return f"model.{excess[0]}: {excess[1]}" if excess else None


def _large_vocabulary(spec: ModelSpec, data: TextInfo, budget: int) -> str | None:
    """Return why the vocabulary makes a model too large; None if it takes less than half of the memory."""
    family = models.load(spec.family)
    size = family.footprint(spec.model, data).total
    share = size - family.footprint(spec.model, TextInfo(vocab_size=1)).total
    if share < size / 2:
        return None
    return (
        f"data: the text has {data.vocab_size:,} different characters (vocab_size), which take {gibibytes(share)} of "
        f"memory to serve, and a model host has {gibibytes(budget)}; replace rare characters, or lower model.n_embd"
    )
