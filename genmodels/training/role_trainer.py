"""One role's part of an optimizer step: gradients of all micro-batches, their norm, the update."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from genmodels.family import Batch, Role
from genmodels.spec.sections import TrainConfig
from genmodels.training.group import Group
from genmodels.training.sharding import average, is_sharded, shard_role

log = logging.getLogger(__name__)


class RoleTrainer:
    """A role's loss module behind `train.strategy`, and its optimizers with their peak learning rates."""

    def __init__(self, role: Role, config: TrainConfig, group: Group, *, alone: bool) -> None:
        """Args:
        alone: the family has no other role.
        """
        self.name, self.loss, self.optimizers = role.name, role.loss, role.optimizers
        self.scalars = shard_role(role, group.device, alone=alone) if is_sharded(config) else []
        plain = {id(scalar.plain) for scalar in self.scalars}
        self.parameters = [p for p in role.loss.parameters() if p.requires_grad and id(p) not in plain]
        self.parameters += [scalar.shared for scalar in self.scalars]
        self.peak_lrs = [[part["lr"] for part in optimizer.param_groups] for optimizer in role.optimizers]
        self.config, self.group = config, group
        if config.compile:
            _compile(role)
        # DDP rebuilds its gradient buckets after the first step unless it looks for unused parameters; a resumed run
        # would then add gradients in another order and differ in its last bits from an uninterrupted run.
        self.call: nn.Module = role.loss
        if group.world_size > 1 and not is_sharded(config):
            self.call = DistributedDataParallel(role.loss, find_unused_parameters=True)

    def set_lr_scale(self, lr_scale: float) -> None:
        """Set each learning rate to `lr_scale` times its peak."""
        for optimizer, peaks in zip(self.optimizers, self.peak_lrs, strict=True):
            for part, peak in zip(optimizer.param_groups, peaks, strict=True):
                part["lr"] = peak * lr_scale

    def backward(self, batches: Sequence[Batch], progress: Tensor, seed: int) -> dict[str, float]:
        """Compute the gradients of the mean loss over all micro-batches and ranks.

        Args:
            progress: share of training that is done, 0-dim float.
            seed: of the first micro-batch; each later one takes the next number.

        Returns:
            The parts of the loss by name, as means over micro-batches and ranks: the same numbers on every rank, so
            that all ranks see a NaN at the same step.
        """
        self.loss.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums: Tensor | None = None
        names: list[str] = []
        for i, batch in enumerate(batches):
            _seed(seed + i, self.group.device)
            with self._no_sync() if i < len(batches) - 1 else contextlib.nullcontext():
                with torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                    losses = self.call(batch, progress)
                (losses["loss"] / len(batches)).backward()
            names = list(losses)
            parts = torch.stack([losses[name].detach().float() for name in names])
            sums = parts if sums is None else sums + parts
        assert sums is not None
        average(self.scalars)
        means = self.group.sum(sums / len(batches) / self.group.world_size).tolist()
        return dict(zip(names, means, strict=True))

    def clip_gradients(self) -> float:
        """Scale the gradients down to the norm `train.clip_norm` where it is set; return their norm before."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def update(self) -> None:
        """Let the optimizers change the weights."""
        for optimizer in self.optimizers:
            optimizer.step()

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        return self.call.no_sync() if isinstance(self.call, DistributedDataParallel) else contextlib.nullcontext()


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that a loss can use; `torch.manual_seed` also looks for devices of any other kind."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _compile(role: Role) -> None:
    if not role.compilable:
        log.warning("train.compile: role %s stays uncompiled (its loss differentiates a gradient)", role.name)
        return
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        log.warning("train.compile: no C++ compiler on this machine; role %s stays uncompiled", role.name)
        return
    role.loss.compile()
