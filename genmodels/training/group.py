"""A process's place among the workers of one attempt, and the collectives of the training loop."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

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

    def announce(self, topic: str, text: str) -> None:
        """Leave a text for the other ranks where they meet, outside of collectives, which may hang."""
        if dist.is_initialized():
            _meeting_place().set(topic, text)

    def announced(self, topic: str) -> str | None:
        """Return the text that was announced, None if there is none, or no longer a process that could tell."""
        if not dist.is_initialized():
            return None
        place = _meeting_place()
        with contextlib.suppress(dist.DistError):  # rank 0, which holds the texts, has ended
            if place.check([topic]):
                return str(place.get(topic).decode())
        return None


def _meeting_place() -> Any:
    """Return the key-value store through which the ranks have found each other; rank 0 serves it in C++."""
    return dist.distributed_c10d._get_default_store()
