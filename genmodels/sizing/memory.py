"""Compute the memory that a model takes on a model host from its settings, without building it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

HOST_MEMORY = 2 * 2**30  # bytes of models that one model host keeps in memory
SERVED_ROWS = 16  # rows of a forward pass on a model host: texts in one step, or images
MORE_TEXTS = (64, 32)  # texts in one step of a model that takes little memory with them
FLOAT = 4  # bytes of a float32

ConfigT = TypeVar("ConfigT", bound=BaseModel)


@dataclass(frozen=True)
class Footprint:
    """Hold the bytes of memory that a model takes on a model host."""

    weights: int  # of all networks
    kept: int = 0  # further memory while it is loaded: keys and values, rearranged weights, a density
    working: int = 0  # during a forward pass; in each dtype some of it is float32, and all is counted as such

    @property
    def total(self) -> int:
        return self.weights + self.kept + self.working


def too_large(
    config: ConfigT,
    measure: Callable[[ConfigT], Footprint],
    budget: int = HOST_MEMORY,
    purpose: str = "to serve, and a model host has",
) -> tuple[str, str] | None:
    """Return the setting that makes a model too large, and a remedy; None if the model fits.

    The setting is the integer that exceeds its default most, if lowering it alone is enough.

    Args:
        purpose: text between the memory that the model takes and the memory that there is.

    Returns:
        The name of the setting, and a text to print after it.
    """
    size = measure(config).total
    if size <= budget:
        return None
    names = _by_excess(config)
    for name in names:
        if (fits := _largest_that_fits(config, name, measure, budget)) is not None:
            remedy = f"write at most {fits}"
            break
    else:
        name, remedy = names[0], f"lower it, and {' and '.join(names[1:3])}"
    takes = f"it takes {gibibytes(size)} of memory {purpose} {gibibytes(budget)}"
    return name, f"got {getattr(config, name)}: {takes}; {remedy}"


def network_bytes(family: Any, config: BaseModel, data: BaseModel, number_bytes: int = FLOAT) -> int:
    """Return the bytes of all networks of `family(config, data)`, with `number_bytes` for each number.

    They are linear in the number of equal blocks, so two shallow models without memory give those of any depth.
    """
    if family.repeated is None:
        return number_bytes * _numbers_of(family, config.model_dump_json(), data)
    one, two = (
        _numbers_of(family, config.model_copy(update={family.repeated: depth}).model_dump_json(), data)
        for depth in (1, 2)
    )
    return number_bytes * (one + (getattr(config, family.repeated) - 1) * (two - one))


@lru_cache(1024)
def _numbers_of(family: Any, config: str, data: BaseModel) -> int:
    from genmodels.sizing.outline import shapes_only

    with shapes_only():
        built = family(family.Config.model_validate_json(config), data)
    return sum(tensor.numel() for network in built.networks().values() for tensor in network.state_dict().values())


def gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _by_excess(config: BaseModel) -> list[str]:
    """Return the names of integer settings, in the order of value divided by default, largest first."""
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    numbers = [name for name, value in defaults.items() if type(value) is int and value > 0]
    return sorted(numbers, key=lambda name: getattr(config, name) / defaults[name], reverse=True)


def _largest_that_fits(config: ConfigT, name: str, measure: Callable[[ConfigT], Footprint], budget: int) -> int | None:
    """Return the value of a setting, halved until the model fits; None if no value fits."""
    value = getattr(config, name) // 2
    while value:
        try:
            smaller = type(config).model_validate({**config.model_dump(), name: value})
        except ValidationError:  # e.g. not a multiple of another setting
            pass
        else:
            if measure(smaller).total <= budget:
                return int(value)
        value //= 2
    return None
