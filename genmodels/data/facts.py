"""Return the shape and size of a dataset before training, without reading the dataset if possible."""

from __future__ import annotations

from dataclasses import dataclass, field

from genmodels.data import DATASETS, DataConfig, Dataset, TextData, open_dataset, uploads
from genmodels.data.text import training_windows, validation_windows
from genmodels.family import DataInfo
from genmodels.storage import Storage


@dataclass(frozen=True)
class Facts:
    """Hold the shape and size of a dataset."""

    info: DataInfo
    training: int  # pictures, or characters
    validation: int
    notes: list[str] = field(default_factory=list)  # for the user: what was done to the data
    vocabulary: str | None = None  # of a text that was opened

    def examples(self, block_size: int | None) -> tuple[int, int]:
        """Return the numbers of training and validation examples: pictures, or windows of `block_size` characters."""
        if self.info.kind == "image" or block_size is None:
            return self.training, self.validation
        return training_windows(self.training, block_size), validation_windows(self.validation, block_size)


def facts_of(config: DataConfig, storage: Storage | None, *, open_all: bool) -> Facts:
    """Return the shape and size of a dataset; a path of the user is always opened.

    Args:
        open_all: open built-in and stored datasets too, to be certain that they are complete on this machine.

    Raises:
        DataError: the dataset is missing, damaged, too small or too large.
    """
    if config.path is not None or open_all:
        return _of_dataset(open_dataset(config, storage))
    assert config.dataset is not None
    if config.is_added:
        assert storage is not None
        return _of_stored(uploads.find(storage, config.dataset, config.sha256))
    source = DATASETS[config.dataset]
    return Facts(source.info, *source.sizes)


def _of_dataset(dataset: Dataset) -> Facts:
    if isinstance(dataset, TextData):
        return Facts(dataset.info, len(dataset.train), len(dataset.val), dataset.notes, dataset.tokenizer.vocab)
    training, validation = (len(dataset.arrays(name)["images"]) for name in ("train", "val"))
    return Facts(dataset.info, training, validation, dataset.notes)


def _of_stored(dataset: uploads.StoredDataset) -> Facts:
    validation = dataset.validation
    if validation is None:  # added by a release that did not store it; with classes it may be slightly more
        validation = dataset.examples - dataset.examples * 9 // 10
    return Facts(dataset.info, dataset.examples - validation, validation)
