"""Muon, with the matrices of one shape in one batch.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Muon(torch.optim.Muon):
    """Take torch's Muon step with few calls: torch takes one matrix at a time, and in bfloat16 on every processor.

    The settings and the stored state are those of `torch.optim.Muon`. A matrix that the ranks share is orthogonalised
    as a whole on each rank, so that the result does not depend on how many ranks share it.
    """

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change the matrices that have a gradient.

        Args:
            closure: computes the gradients again, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update({matrix: matrix.grad for matrix in group["params"] if matrix.grad is not None}, group)
        return loss

    def _update(self, gradient_of: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        """Change the matrices of a parameter group that have a gradient."""
        if not gradient_of:
            return
        matrices, gradients = list(gradient_of), list(gradient_of.values())
        momenta = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])

        batches: dict[tuple[torch.Size, torch.device], list[int]] = defaultdict(list)
        wide = [_wide(_whole(direction)) for direction in directions]
        for index, direction in enumerate(wide):
            batches[direction.shape, direction.device].append(index)
        for indices in batches.values():
            stacked = torch.stack([wide[index] for index in indices])
            updates = orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
            for index, update in zip(indices, updates, strict=True):
                matrix = matrices[index]
                rows, columns = matrix.shape
                scale = math.sqrt(max(1, rows / columns))
                matrix.add_(_like(update.mT if rows > columns else update, matrix), alpha=-group["lr"] * scale)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring all singular values near 1, by Newton-Schulz iterations: (n, rows, columns), rows <= columns -> the same.

    The iterations are bfloat16 where that is fast, else float32: three digits are enough.
    """
    a, b, c = coefficients
    x = matrices.to(_fast_dtype(matrices.device.type))
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


@cache
def _fast_dtype(device: str) -> torch.dtype:
    """Return the dtype for iterations on a kind of device. A CPU without instructions for bfloat16 is slow in it."""
    capabilities = torch.cpu.get_capabilities()
    if device == "cpu" and not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return torch.float32
    return torch.bfloat16


def _whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which each rank may have a part."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor


def _wide(matrix: Tensor) -> Tensor:
    """Return the matrix, or its transpose if that has fewer rows."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _like(update: Tensor, matrix: Tensor) -> Tensor:
    """Return this rank's part of an update, if the ranks share the matrix."""
    if not _is_shared(matrix):
        return update
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(update, matrix.device_mesh, matrix.placements, src_data_rank=None)


def _is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor. Its module is slow to load: it is loaded already where there is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
