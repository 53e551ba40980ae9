"""Smooth images, and a short training of an image family on them without the training loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from genmodels.family import Family, OptimizerConfig


def blobs(n: int, shape: tuple[int, ...] = (1, 12, 8)) -> torch.Tensor:
    """Return smooth images, (n, C, H, W) in [0, 1]."""
    coarse = torch.rand(n, shape[0], 3, 2, generator=torch.Generator().manual_seed(n))
    return F.interpolate(coarse, shape[1:], mode="bilinear")


def train(model: Family[Any, Any], steps: int, learning_rate: float = 1e-2, size: int = 32) -> list[dict[str, float]]:
    """Train the single role of an image family on `size` blobs; return its losses by step."""
    (role,) = model.roles(OptimizerConfig(learning_rate=learning_rate))
    batch, rows = {"images": blobs(size, model.data.shape)}, []
    for step in range(steps):
        torch.manual_seed(step)
        losses = role.loss(batch, torch.tensor(step / steps))
        for optimizer in role.optimizers:
            optimizer.zero_grad()
        losses["loss"].backward()
        for optimizer in role.optimizers:
            optimizer.step()
        rows.append({name: float(value.detach()) for name, value in losses.items()})
    return rows
