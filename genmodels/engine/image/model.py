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
        return self.family.sizes

    def enable_metrics(self) -> None:
        self.batcher.metrics = ImageMetrics(self.labels)
