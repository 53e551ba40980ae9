"""A process's place among the workers of one attempt, and the collectives of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One worker of `world_size`. With one worker there is no process group, and a collective does nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def from_rank_0(self, flag: bool) -> bool:
        """Return the flag of rank 0 on every rank."""
        if not dist.is_initialized():
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, src=0)
        return bool(shared.item())
