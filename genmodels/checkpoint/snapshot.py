"""Hold what a checkpoint saves in the memory of a training process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Hold the content of a checkpoint as CPU copies, which training no longer changes."""

    step: int
    samples: int
    metrics: dict[str, float]
    serving_weights: dict[str, Tensor]  # averaged (EMA) if the spec asks for it
    roles: dict[str, dict[str, Tensor]]  # raw weights
    optimizers: dict[str, list[dict[str, Tensor]]]  # per role and optimizer: "<parameter index>.<name>" -> tensor


def optimizer_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of `Optimizer.state_dict()` in one flat dict; hyper-parameters come from the spec instead."""
    return {
        f"{index}.{name}": value.detach().cpu().clone()
        for index, values in state["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load the result of `optimizer_tensors` into an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
