"""Images that stay in their files, and are read or decoded each time when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

IN_MEMORY = 2**30  # bytes of decoded images that a process holds; those of a larger dataset stay in their files
BLOCK = 256  # images that are read at once where all are needed


@dataclass(frozen=True)
class StoredImages:
    """Images as uint8 (n, C, H, W), indexed like an array: by a number, a slice, integers (m,) or a mask (n,)."""

    read: Callable[[np.ndarray], np.ndarray]  # some of all images of the dataset: integers (m,) -> uint8 (m, C, H, W)
    rows: np.ndarray  # which of them these are
    image_shape: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.image_shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = self.rows[index]
        return self.read(rows) if rows.ndim else self.read(rows[None])[0]

    def astype(self, dtype: Any) -> np.ndarray:
        return self[:].astype(dtype)


Images: TypeAlias = np.ndarray | StoredImages


def select(images: Images, mask: np.ndarray) -> Images:
    """Return the images of a mask (n,); those of files stay there."""
    if isinstance(images, StoredImages):
        return StoredImages(images.read, images.rows[mask], images.image_shape)
    return images[mask]


def blocks(images: Images) -> Iterator[np.ndarray]:
    """Yield all images, some at a time."""
    return (images[first : first + BLOCK] for first in range(0, len(images), BLOCK))
