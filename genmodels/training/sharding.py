"""Share a model's weights, gradients and optimizer states among the ranks, by torch's `fully_shard` (FSDP2).

Between two uses each rank holds its rows of each parameter, as a DTensor. A role's loss gathers the parameters that it
needs in its forward and backward passes: layer by layer, where a role has layers and no other role calls them. What
calls a network in another way (the loss of another role, an evaluation) gathers it as a whole, see `gathered`.

`fully_shard` cannot divide a parameter without dimensions. Each rank keeps such a scalar; the ranks average its
gradient, and the optimizer changes it through a DTensor that shares its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from genmodels.family import Role
from genmodels.spec.sections import TrainConfig


class Scalar(NamedTuple):
    """A parameter without dimensions, and the DTensor on the same memory that the optimizer changes."""

    plain: nn.Parameter
    shared: nn.Parameter


def is_sharded(config: TrainConfig) -> bool:
    """Return whether the ranks share the weights; a process without a process group shares with no other."""
    return config.strategy == "fsdp2" and dist.is_initialized()


def shard_weights(module: nn.Module, device: torch.device, *, by_layer: bool) -> DeviceMesh:
    """Leave to each rank its part of the parameters of a module; return the mesh of all ranks.

    Of a module that was built without memory, each rank allocates its part alone.

    Args:
        by_layer: gather the entries of each ModuleList only while they are called.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for layer in _layers(module) if by_layer else ():
        fully_shard(layer, mesh=mesh, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    take_memory(module, device)
    return mesh


def take_memory(module: nn.Module, device: torch.device) -> None:
    """Allocate the tensors of a module that was built without memory; their contents are undefined."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        # PyTorch keeps the identity of a distributed parameter, so that one which two layers share stays one.
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def shard_role(role: Role, device: torch.device, *, alone: bool) -> list[Scalar]:
    """Share the parameters of a role among the ranks, and give its optimizers the rank's own parts.

    Args:
        alone: the family has no other role, whose loss might call the networks of this one.

    Returns:
        The parameters without dimensions: call `average` before the optimizer's step.
    """
    whole = dict(role.loss.named_parameters())
    # A loss that differentiates a gradient needs all weights until its end.
    mesh = shard_weights(role.loss, device, by_layer=alone and role.compilable)
    parts = dict(role.loss.named_parameters())
    scalars = [Scalar(p, nn.Parameter(_replicated(p.data, mesh))) for p in parts.values() if p.ndim == 0]
    shared = {id(scalar.plain): scalar.shared for scalar in scalars}
    new = {id(parameter): shared.get(id(parts[name]), parts[name]) for name, parameter in whole.items()}
    for optimizer in role.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new[id(parameter)] for parameter in group["params"]]
    return scalars


def average(scalars: Iterable[Scalar]) -> None:
    """Average the gradients of scalars over the ranks, and hand them to the optimizer."""
    for plain, shared in scalars:
        if plain.grad is None:
            continue
        dist.all_reduce(plain.grad)
        assert isinstance(shared, DTensor)
        shared.grad = _replicated(plain.grad / dist.get_world_size(), shared.device_mesh)
        plain.grad = None


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Hold the parameters of modules as a whole on each rank; do nothing for modules that are not sharded.

    All ranks must enter it together.
    """
    parts = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def has_parts(module: nn.Module) -> bool:
    """Return whether the ranks share the weights of a module."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, on the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost ModuleLists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
