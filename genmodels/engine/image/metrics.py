"""Metrics of a loaded image model."""

from __future__ import annotations

from genmodels.engine.metrics import GaugeShare
from genmodels.metrics import BATCH_SIZE, IMAGES, WAITING, Labels


class ImageMetrics:
    """Count the answers and the load of one image model."""

    def __init__(self, labels: Labels) -> None:
        self.batch_size = BATCH_SIZE.labels(*labels)
        self.waiting = GaugeShare(WAITING.labels(*labels))
        self._labels = labels

    def add_outputs(self, verb: str, count: int) -> None:
        """Count the images or latents of one answer."""
        IMAGES.labels(*self._labels, verb).inc(count)
