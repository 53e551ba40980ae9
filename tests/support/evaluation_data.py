"""Make small images of different classes, and the arguments of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from genmodels.data import TextData
from genmodels.data.images import ImageData, ImageSplit
from genmodels.family import EvaluationData

CLASSES = 4


def shapes(train: int = 480, val: int = 120, side: int = 16, channels: int = 1, labelled: bool = True) -> ImageData:
    """Draw squares, bars and crosses of four classes, at random places, on a dark ground with a little noise."""
    random = np.random.default_rng(0)
    images = random.integers(0, 30, (train + val, channels, side, side)).astype(np.uint8)
    labels = random.permutation(np.arange(train + val) % CLASSES)
    for image, label in zip(images, labels, strict=True):
        row, column = random.integers(1, side - 6, 2)
        grey = random.integers(150, 255)
        if label == 0:
            image[:, row : row + 6, column : column + 6] = grey
        if label in (1, 3):
            image[:, row + 2 : row + 4, column : column + 6] = grey
        if label in (2, 3):
            image[:, row : row + 6, column + 2 : column + 4] = grey
    names = [str(label) for label in range(CLASSES)] if labelled else []
    train_split, val_split = (
        ImageSplit(images[part], labels[part] if labelled else None) for part in (slice(train), slice(train, None))
    )
    return ImageData(train_split, val_split, names)


@dataclass
class Bench:
    """Make the data for evaluations, and count the cached results and progress reports."""

    kept: dict[str, bytes] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    reports: int = 0

    def evaluation_data(self, data: ImageData | TextData, thorough: bool = False) -> EvaluationData:
        def report_progress() -> None:
            self.reports += 1

        def cached(name: str, make: Callable[[], bytes]) -> bytes:
            if name not in self.kept:
                self.made.append(name)
                self.kept[name] = make()
            return self.kept[name]

        return EvaluationData(data.arrays("train"), data.arrays("val"), data.digest, thorough, report_progress, cached)
