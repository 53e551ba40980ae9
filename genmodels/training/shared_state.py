"""Save and restore a state that the ranks share: each rank its own rows (see `genmodels.checkpoint.parts`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from genmodels.checkpoint import (
    WEIGHTS,
    Snapshot,
    SnapshotMemory,
    TensorFile,
    load_optimizer,
    optimizer_tensors,
)
from genmodels.checkpoint.parts import lay_out, tensor_name
from genmodels.errors import CheckpointError
from genmodels.family import Family
from genmodels.training.group import Group
from genmodels.training.resume import Parent, optimizer_file, weights_file
from genmodels.training.role_trainer import RoleTrainer
from genmodels.training.sharding import has_parts, local, shard_weights, take_memory


@dataclass(frozen=True)
class SharedState:
    """The weights and optimizer states of roles, and the averaged weights, of which each rank holds some rows."""

    trainers: Sequence[RoleTrainer]
    averaged: nn.Module
    group: Group
    has_average: bool  # the averaged weights differ from the trained ones

    @staticmethod
    def begin(
        trainers: Sequence[RoleTrainer],
        family: Family[Any, Any],
        averaged: Family[Any, Any],
        initial: Family[Any, Any] | None,
        group: Group,
        has_average: bool,
    ) -> SharedState:
        """Share two models that were built without memory, and set both to `initial`, a whole model that rank 0 has.

        Rank 0 sends it tensor by tensor: no other rank ever holds it as a whole.

        Args:
            trainers: of the roles of `family`, which share its weights already.
        """
        for network in family.networks().values():
            take_memory(network, group.device)
        whole = initial.tensors() if initial else {}
        for name, tensor in family.tensors().items():
            _receive_rows(tensor, whole.get(name), group)
        if initial:
            initial.to(torch.device("meta"))  # frees its memory: the caller still refers to it
        shard_weights(averaged.network, group.device, by_layer=False)
        for name, network in averaged.networks().items():
            source = family.networks()[name]
            if network is averaged.network or not has_parts(source):  # other trained networks have no average
                take_memory(network, group.device)
                _copy(network, source)
        return SharedState(trainers, averaged.network, group, has_average)

    def snapshot(self, memory: SnapshotMemory, step: int, samples: int, metrics: dict[str, float]) -> Snapshot:
        """Copy this rank's rows, and on rank 0 the whole serving weights, tensor by tensor. All ranks must call it."""
        serving = self.averaged.state_dict()
        rows = dict(_named(WEIGHTS, serving)) if self.has_average else {}
        for trainer in self.trainers:
            rows |= _named(weights_file(trainer.name), trainer.loss.state_dict())
            for i, optimizer in enumerate(trainer.optimizers):
                rows |= _named(optimizer_file(trainer.name, i), optimizer_tensors(optimizer.state_dict()))
        layout = lay_out(rows, self.group.rank)
        content = {layout.name: layout.tensors} | ({WEIGHTS: serving} if self.group.rank == 0 else {})
        files = memory.allocate(content, {layout.name: layout.metadata})
        files[layout.name].copy(layout.tensors)
        for name in sorted(serving):
            whole = serving[name].full_tensor() if isinstance(serving[name], DTensor) else serving[name]
            if self.group.rank == 0:
                files[WEIGHTS].tensors[name].copy_(whole)
        if self.group.device.type == "cuda":  # the copies run on the GPU's own time
            torch.cuda.synchronize()
        return Snapshot(step, samples, metrics, files, layout)

    def restore(self, parent: Parent) -> None:
        """Set weights and optimizers to those of a checkpoint with parts or without, and free what was read of it.

        If the averaged weights do not differ from the trained ones, they are left as they are.
        """
        stored = parent.parts or _Received(parent.files, self.group)
        if self.has_average:
            stored.load(dict(_named(WEIGHTS, self.averaged.state_dict())))
        for trainer in self.trainers:
            stored.load(dict(_named(weights_file(trainer.name), trainer.loss.state_dict())))
            for i, optimizer in enumerate(trainer.optimizers):
                file = optimizer_file(trainer.name, i)
                first = tensor_name(file, "")
                names = [name.removeprefix(first) for name in stored.shapes if name.startswith(first)]
                empty = _empty(optimizer, names)
                stored.load(dict(_named(file, empty)))
                load_optimizer(optimizer, empty)
        for files in (parent.files, parent.parts.files if parent.parts else {}):
            files.clear()


class _Received:
    """The tensors of a checkpoint without parts, which rank 0 has read: it sends one after the other to all ranks."""

    def __init__(self, files: Mapping[str, TensorFile], group: Group) -> None:
        self._tensors = {name: one for file, content in files.items() for name, one in _named(file, content.tensors)}
        self._group = group
        shapes = json.dumps({name: list(tensor.shape) for name, tensor in self._tensors.items()})
        self.shapes: dict[str, list[int]] = json.loads(group.receive_bytes(shapes.encode()))

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Copy tensors into others, see `_receive_rows`."""
        for name in sorted(targets):
            if self.shapes.get(name) != list(targets[name].shape):
                raise CheckpointError(f"the checkpoint is of another model or release: {name} differs")
            _receive_rows(targets[name], self._tensors.get(name), self._group)


@torch.no_grad()
def _copy(target: nn.Module, source: nn.Module) -> None:
    """Set the tensors of a module to those of an equal one; of distributed tensors a rank copies its own rows."""
    for mine, theirs in zip(_tensors(target), _tensors(source), strict=True):
        local(mine).copy_(local(theirs))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _receive_rows(target: Tensor, source: Tensor | None, group: Group) -> None:
    """Copy a tensor that rank 0 has to all ranks: into a distributed tensor only the rows that a rank holds."""
    whole = torch.empty(target.shape, dtype=target.dtype, device=group.device)
    group.receive(whole, source)
    with torch.no_grad():
        local(target).copy_(local(_like(whole, target)))


def _named(file: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((tensor_name(file, key), tensor) for key, tensor in tensors.items())


def _empty(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state to load into: each like its parameter, except the count of steps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for name in names:
        index, _, kind = name.partition(".")
        state[name] = torch.zeros(()) if kind == "step" else torch.zeros_like(parameters[int(index)].detach())
    return state


def _like(whole: Tensor, target: Tensor) -> Tensor:
    """Distribute a tensor that all ranks have as another one is."""
    if not isinstance(target, DTensor):
        return whole
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
