"""An image model in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from genmodels.engine.image.batcher import DynamicBatcher
from genmodels.engine.image.metrics import ImageMetrics
from genmodels.engine.model import LoadedModel
from genmodels.family import ImageFamily


@dataclass(frozen=True)
class ImageModel(LoadedModel):
    family: ImageFamily[Any, Any]

    batcher: DynamicBatcher = field(default_factory=DynamicBatcher)  # shared by all requests

    def describe(self) -> dict[str, int | str]:
        info = self.family.data
        sizes: dict[str, int | str] = {
            "size": f"{info.width}x{info.height}",
            "channels": info.channels,
            "latent_dim": self.family.latent_dim,
        }
        return {**sizes, "num_classes": self.family.num_classes} if self.family.num_classes else sizes

    def enable_metrics(self) -> None:
        self.batcher.metrics = ImageMetrics(self.labels)
