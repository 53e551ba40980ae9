"""How much memory a model takes where it is served: computed from its settings, before anything is built or read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

HOST_MEMORY = 2 * 2**30  # bytes of models that one host keeps
SERVED_ROWS = 16  # of every pass where models are served: texts in one step, images
FLOAT = 4  # bytes of a float32

ConfigT = TypeVar("ConfigT", bound=BaseModel)


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that a model takes where it is served."""

    weights: int  # of all its networks
    kept: int = 0  # beside them, for as long as it is loaded: keys and values, weights arranged anew, a density
    working: int = 0  # for the time of a pass of `SERVED_ROWS` rows

    @property
    def total(self) -> int:
        return self.weights + self.kept + self.working


def too_large(
    config: ConfigT, measure: Callable[[ConfigT], Footprint], budget: int = HOST_MEMORY
) -> tuple[str, str] | None:
    """Tell which setting makes a model too large to be served, and what would be right; None if it fits.

    That is the whole number furthest above its default, if lowering it alone is enough.

    Returns:
        The setting's name, and a text that goes after it.
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
    takes = f"it takes {gibibytes(size)} of memory to serve, and a model host has {gibibytes(budget)}"
    return name, f"got {getattr(config, name)}: {takes}; {remedy}"


def network_bytes(family: Any, config: BaseModel, data: BaseModel) -> int:
    """Bytes of all networks of `family(config, data)`.

    They are linear in the number of equal blocks, so two shallow models without memory tell those of any depth.
    """
    if family.repeated is None:
        return _bytes_of(family, config.model_dump_json(), data)
    one, two = (
        _bytes_of(family, config.model_copy(update={family.repeated: depth}).model_dump_json(), data)
        for depth in (1, 2)
    )
    return one + (getattr(config, family.repeated) - 1) * (two - one)


@lru_cache(1024)
def _bytes_of(family: Any, config: str, data: BaseModel) -> int:
    from torch import nn

    from genmodels.sizing.outline import shapes_only

    with shapes_only():
        built = family(family.Config.model_validate_json(config), data)
    networks = [value for value in vars(built).values() if isinstance(value, nn.Module)]
    return sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())


def gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _by_excess(config: BaseModel) -> list[str]:
    """The names of whole numbers, those furthest above their defaults first."""
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    numbers = [name for name, value in defaults.items() if type(value) is int and value > 0]
    return sorted(numbers, key=lambda name: getattr(config, name) / defaults[name], reverse=True)


def _largest_that_fits(config: ConfigT, name: str, measure: Callable[[ConfigT], Footprint], budget: int) -> int | None:
    """The setting's value halved until the model fits."""
    value = getattr(config, name) // 2
    while value:
        try:
            smaller = type(config).model_validate({**config.model_dump(), name: value})
        except ValidationError:  # no multiple of another setting, say
            pass
        else:
            if measure(smaller).total <= budget:
                return int(value)
        value //= 2
    return None
