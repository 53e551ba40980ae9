"""TODO"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from genmodels.engine.image.batcher import Passes
from genmodels.engine.metrics import ImageMeter
from genmodels.engine.model import Loaded
from genmodels.family import ImageFamily


@dataclass(frozen=True)
class ImageModel(Loaded):
    family: ImageFamily[Any, Any]

    passes: Passes = field(default_factory=Passes)  # what its requests share

    def meter(self) -> None:
        self.passes.meter = ImageMeter(self.labels)
