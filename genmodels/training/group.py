"""A process's place among the workers of one attempt, and the collectives of the training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# How long a rank waits for the others to save their parts, e.g. while storage is away; then the attempt fails, and the
# next one resumes from the checkpoint before.
SAVE_TIMEOUT = timedelta(hours=1)


@dataclass
class Group:
    """One worker of `world_size`. With one worker a collective does nothing, even in a process group of one."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _exchanged: float = field(default_factory=time.monotonic, init=False)  # when a collective last ended
    _usual: float = field(default=0.0, init=False)  # seconds between the last two

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            self._note_exchange()
        return tensor

    def all(self, flag: bool) -> bool:
        """Return whether the flag is set on every rank."""
        return not self.sum(torch.tensor(int(not flag), device=self.device)).item()

    def from_rank_0(self, flag: bool) -> bool:
        """Return the flag of rank 0 on every rank."""
        if self.world_size == 1:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, src=0)
        result = bool(shared.item())
        self._note_exchange()
        return result

    def receive(self, tensor: Tensor, source: Tensor | None) -> None:
        """Set a tensor to the value of `source` on rank 0, on every rank; the other ranks have no `source`."""
        with torch.no_grad():
            if source is not None:
                tensor.copy_(source)
            if self.world_size > 1:
                whole = tensor.contiguous()  # the tensor itself, if it is contiguous
                dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
                self._note_exchange()
                if not tensor.is_contiguous():
                    tensor.copy_(whole)

    def receive_bytes(self, data: bytes) -> bytes:
        """Return the bytes that rank 0 has, on every rank."""
        if self.world_size == 1:
            return data
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, src=0)
        shared = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        self.receive(shared, torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 and data else None)
        return shared.cpu().numpy().tobytes()

    def still_seconds(self) -> float:
        """Return for how long there was no collective, less the time between the two before. Other threads may ask."""
        return time.monotonic() - self._exchanged - self._usual

    def _note_exchange(self) -> None:
        now = time.monotonic()
        self._usual, self._exchanged = now - self._exchanged, now


class SideGroup:
    """All ranks once more, for their threads that save checkpoints: training uses the default group meanwhile."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def gather(self, data: bytes) -> list[bytes]:
        """Return the bytes of all ranks on rank 0, and nothing elsewhere."""
        size = torch.tensor([len(data)])
        sizes = [torch.empty_like(size) for _ in range(self.world_size)]
        dist.all_gather(sizes, size, group=self._group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        received = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, received, dst=0, group=self._group)
        return [each[:size].numpy().tobytes() for each, size in zip(received or [], sizes, strict=False)]
