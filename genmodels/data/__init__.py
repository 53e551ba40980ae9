"""Open the dataset that the `data` section of a spec names; split it, and order its samples.

Uses numpy only: the training loop converts batches to tensors.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from genmodels.data import uploads
from genmodels.data.files import shown
from genmodels.data.images import ImageData, decode_image, from_csv, from_idx, grid, png, read_folder, train_val_split
from genmodels.data.sources import DATASETS, read
from genmodels.data.text import CharTokenizer, TextData, Tokenizer, load_tokenizer, read_text
from genmodels.data.uploads import IMAGE_SIZE, MAX_SIZE, MIN_SIZE
from genmodels.errors import DataError
from genmodels.schema.base import Section
from genmodels.storage import Storage

__all__ = [
    "DATASETS",
    "CharTokenizer",
    "DataConfig",
    "Dataset",
    "ImageData",
    "Split",
    "TextData",
    "Tokenizer",
    "batch_indices",
    "decode_image",
    "grid",
    "load_tokenizer",
    "open_dataset",
    "order",
    "png",
    "resolve_data",
    "shard",
]

Dataset = ImageData | TextData


class DataConfig(Section):
    """Name the data of a model: a named dataset, or a text file or folder of pictures of the user.

    Validation reads from its context: `datasets`, the kind of each added dataset by name; `paths`, False if paths are
    not allowed; `stored`, True for a spec that was checked before.
    """

    dataset: str | None = Field(
        default=None,
        json_schema_extra={"pattern": uploads.NAME, "examples": [*DATASETS]},
        description="name of a built-in dataset, or of a dataset added with `genmodels data add`",
    )
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="content of an added dataset; default: the newest content"
    )
    path: str | None = Field(default=None, min_length=1, description="a text file (UTF-8), or a folder of pictures")
    image_size: int | None = Field(
        default=None,
        ge=MIN_SIZE,
        le=MAX_SIZE,
        description=f"side of the square pictures made from a folder, in pixels; default: {IMAGE_SIZE}",
    )
    channels: Literal[1, 3] | None = Field(
        default=None,
        description="channels of pictures: 1 (grey) or 3 (RGB); default: 1 if every picture is grey, else 3",
    )

    @field_validator("dataset")
    @classmethod
    def _is_known(cls, name: str | None, info: ValidationInfo) -> str | None:
        context = info.context or {}
        added = context.get("datasets", {})
        is_stored = context.get("stored") and name and re.fullmatch(uploads.NAME, name)
        if name is None or is_stored or name in DATASETS or name in added:
            return name
        known = [*DATASETS, *added]
        near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else "."
        listed = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
        path = "`path`, or " if context.get("paths", True) else ""
        own = f"Your own data: {path}`genmodels data add NAME FILE|FOLDER`"
        raise ValueError(f"unknown dataset {name[:100]!r}{hint} Known: {listed}. {own}")

    @field_validator("path")
    @classmethod
    def _may_be_named(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is None or (info.context or {}).get("paths", True):
            return path
        raise ValueError(
            "is a file of this machine, which a cluster does not have: "
            "run genmodels data add NAME FILE|FOLDER, then write `dataset: NAME`"
        )

    @model_validator(mode="after")
    def _is_one(self) -> DataConfig:
        if self.dataset is None and self.path is None:
            raise ValueError("name a `dataset`, or give the `path` of a text file or a folder of pictures")
        if self.dataset is not None and self.path is not None:
            raise ValueError("has both `dataset` and `path`: remove one of them")
        if self.sha256 is not None and not self.is_added:
            raise ValueError("`sha256` is for a dataset that was added with `genmodels data add`: remove it")
        for field in ("image_size", "channels"):
            if getattr(self, field) is not None and (self.dataset or os.path.isfile(self._expanded)):
                raise ValueError(f"`{field}` is for a folder of pictures of your own: remove it")
        return self

    @property
    def is_added(self) -> bool:
        """Return whether the dataset was added to the storage by a user."""
        return self.dataset is not None and self.dataset not in DATASETS

    @property
    def _expanded(self) -> str:
        return os.path.expanduser(self.path or "")


class Split(Protocol):
    """Give the examples of one part of a dataset."""

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""

    def take(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        """Return a batch, by name: the examples `index`, each as in its `epoch`; both have shape (n,)."""


def open_dataset(config: DataConfig, storage: Storage | None = None) -> ImageData | TextData:
    """Find, verify and load a dataset.

    Args:
        storage: the storage with added datasets.

    Raises:
        DataError: the dataset is missing, damaged, too small or too large; the message says what to do.
    """
    if config.path is not None:
        return _open_path(config)
    assert config.dataset is not None
    if config.is_added:
        return uploads.load(config.dataset, config.sha256, storage)
    source = DATASETS[config.dataset]
    files = read(source)
    if source.kind == "text":
        return TextData(files[0].decode())
    return from_idx(files, source.class_names) if len(files) == 4 else from_csv(files[0], source.class_names)


def resolve_data(config: DataConfig, storage: Storage) -> DataConfig:
    """Return the section with the sha256 that an added dataset has now, so that content added later does not change it.

    Raises:
        DataError: the dataset or this content of it does not exist.
    """
    if not config.is_added:
        return config
    assert config.dataset is not None
    return config.model_copy(update={"sha256": uploads.find(storage, config.dataset, config.sha256).sha256})


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the permutation of 0 .. n-1 in which an epoch visits its examples; it depends only on the arguments."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, seed: int, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` samples of the endless sequence of reshuffled epochs, from sample number `first_sample` on.

    `first_sample`, the number of samples that all workers have seen, is the whole position in the data.

    Returns:
        index and epoch of each sample, both int64 (count,), for `Split.take`.
    """
    sample = np.arange(first_sample, first_sample + count)
    epoch, place = np.divmod(sample, n)
    index = np.empty(count, np.int64)
    for number in np.unique(epoch):
        here = epoch == number
        index[here] = _cached_order(seed, int(number), n)[place[here]]
    return index, epoch


def shard(index: np.ndarray, epoch: np.ndarray, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of a batch for one worker: every `world_size`-th sample from `rank` on; parts do not overlap."""
    return index[rank::world_size], epoch[rank::world_size]


_cached_order = lru_cache(maxsize=2)(order)  # two: a batch may contain samples of two epochs


def _open_path(config: DataConfig) -> ImageData | TextData:
    path = Path(config._expanded)
    try:
        if path.is_dir():
            return train_val_split(read_folder(path, config.image_size or IMAGE_SIZE, config.channels))
        if path.exists():
            return read_text(path)
    except OSError as error:
        raise DataError(f"data.path: {shown(path)} cannot be read: {error.strerror}") from error
    raise DataError(
        f"data.path: {shown(path)} does not exist (in {Path.cwd()}): name a text file or a folder of pictures"
    )
