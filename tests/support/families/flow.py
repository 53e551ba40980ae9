"""Implement flow matching: a learned velocity moves noise to images.

Lipman et al. 2023, "Flow Matching for Generative Modeling", https://arxiv.org/abs/2210.02747
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from genmodels.family import ImageFamily, OptimizerConfig, Role
from genmodels.nn.latents import image_normal, interpolate, standard_normal
from genmodels.nn.networks import inference, placed
from genmodels.nn.optim import make_optimizers
from genmodels.schema.base import Section

if TYPE_CHECKING:
    from genmodels.family import Batch, Interpolation


class FlowConfig(Section):
    """Describe the `model` section."""

    width: int = Field(256, ge=1, le=4096, description="units of each hidden layer")


class FlowRequest(Section):
    """Describe the options of a generation request."""

    steps: int = Field(20, ge=1, le=200, description="steps from noise to image; more steps are slower and more exact")


class Flow(ImageFamily[FlowConfig, FlowRequest]):
    """Train and sample a flow from N(0, I) at time 0 to images at time 1. A latent is the noise of all pixels."""

    Config = FlowConfig
    Request = FlowRequest
    metric_names = ("val_loss",)

    network: Velocity

    def build_network(self) -> Velocity:
        return Velocity(self.config.width, self.latent_dim)

    def roles(self, optimizer: OptimizerConfig) -> list[Role]:
        loss = FlowLoss(self.network)
        return [Role("model", loss, make_optimizers(loss, optimizer))]

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"].flatten(1)
        noise = image_normal(batch["images"], (self.latent_dim,))  # the same noise for an image at every evaluation
        time = torch.special.ndtr(image_normal(batch["images"], (1,)))
        with inference(self.network):
            errors = squared_errors(self.network, noise, images, time)
        return {"error": errors.double().sum(), "images": errors.new_tensor(len(images)).double()}

    def eval_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return `val_loss`: the mean squared error of the velocity of a pixel."""
        return {"val_loss": float(sums["error"] / sums["images"])}

    @property
    def verbs(self) -> frozenset[str]:
        return frozenset({"generate", "decode", "interpolate"})

    @property
    def latent_dim(self) -> int:
        return math.prod(self.data.shape)

    def sample_latents(self, n: int, seed: int, request: FlowRequest) -> Tensor:
        return standard_normal(n, self.latent_dim, seed)

    def decode(self, latents: Tensor, request: FlowRequest) -> Tensor:
        """Follow the velocity from time 0 to time 1, by Euler's method."""
        x = placed(latents, self.network)
        with inference(self.network):
            for step in range(request.steps):
                time = x.new_full((len(x), 1), step / request.steps)
                x = x + self.network(x, time) / request.steps
        return x.float().clamp(0, 1).unflatten(1, self.data.shape)

    def interpolate(self, start: Tensor, end: Tensor, steps: int, method: Interpolation | None = None) -> Tensor:
        return interpolate(start, end, steps, method or "spherical")


class Velocity(nn.Module):
    """Map points (n, d) and times (n, 1) to velocities (n, d)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat((x, time), 1))


class FlowLoss(nn.Module):
    """Compute the squared error of the velocity of a pixel, at a random time for each image."""

    def __init__(self, network: Velocity) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        images = batch["images"].flatten(1)
        time = torch.rand(len(images), 1, device=images.device)
        return {"loss": squared_errors(self.network, torch.randn_like(images), images, time).mean()}


def squared_errors(network: Velocity, noise: Tensor, images: Tensor, time: Tensor) -> Tensor:
    """Return the mean squared error of each image: noise and images (n, d), time (n, 1) -> (n,), float32."""
    velocity = network((1 - time) * noise + time * images, time).float()
    return (velocity - (images - noise)).square().mean(1)
