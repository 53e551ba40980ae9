"""Count the parameters of a model from its configuration, without building it at its full depth.

A family names the field of its configuration that repeats equal blocks (`Family.repeated`). All counts are linear in
that field, so two shallow models, built on the meta device without memory for weights, give those of any depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from genmodels.family import Family, ImageInfo, OptimizerConfig, TextInfo
from genmodels.schema.base import Section
from genmodels.spec.sections import TrainConfig

CACHE_SIZE = 1024  # counts of shallow models


@dataclass(frozen=True)
class Parameters:
    trained: int  # of all networks
    saved: int  # numbers in a checkpoint: raw weights, serving weights, moments of the optimizers
    served: int  # of the network that is served, which has an average
    window: int | None = None  # tokens in one training window of a text


def held(size: Parameters, train: TrainConfig, workers: int) -> int:
    """Return the numbers that one worker holds between two steps: weights, average, gradients, moments.

    With `strategy: fsdp2` the workers share them. Only the averaged weights are gathered as a whole, for evaluations
    and on rank 0 for each checkpoint: they fit a model host.
    """
    return _shared(size.saved + size.trained, size, train, workers)


def snapshot(size: Parameters, train: TrainConfig, workers: int) -> int:
    """Return the numbers that the first worker copies for a checkpoint: all, or its rows and the serving weights."""
    return _shared(size.saved, size, train, workers)


def count(
    cls: type[Family[Any, Any]], config: Section, data: ImageInfo | TextInfo, optimizer: OptimizerConfig
) -> Parameters:
    """Return the counts of the model `cls(config, data)`, trained with this optimizer."""
    built = OptimizerConfig(optimizer=optimizer.optimizer)
    if cls.repeated is None:
        return _built(cls, config.model_dump_json(), data, built)
    one, two = (
        _built(cls, config.model_copy(update={cls.repeated: depth}).model_dump_json(), data, built) for depth in (1, 2)
    )
    more = getattr(config, cls.repeated) - 1
    return Parameters(
        one.trained + more * (two.trained - one.trained),
        one.saved + more * (two.saved - one.saved),
        one.served + more * (two.served - one.served),
        one.window,
    )


def _shared(numbers: int, size: Parameters, train: TrainConfig, workers: int) -> int:
    return numbers if train.strategy == "ddp" or workers == 1 else math.ceil(numbers / workers) + size.served


@lru_cache(CACHE_SIZE)
def _built(
    cls: type[Family[Any, Any]], config: str, data: ImageInfo | TextInfo, optimizer: OptimizerConfig
) -> Parameters:
    from torch.optim import Muon

    from genmodels.sizing.outline import shapes_only

    with shapes_only():
        family = cls(cls.Config.model_validate_json(config), data)
        roles = family.roles(optimizer)
    moments = sum(
        (1 if isinstance(one, Muon) else 2) * sum(parameter.numel() for parameter in group["params"])
        for role in roles
        for one in role.optimizers
        for group in one.param_groups
    )
    weights = sum(tensor.numel() for role in roles for tensor in role.loss.state_dict().values())
    serving = sum(tensor.numel() for tensor in family.network.state_dict().values())
    trained = sum(parameter.numel() for role in roles for parameter in role.loss.parameters())
    return Parameters(trained, weights + serving + moments, serving, family.sequence_length)
