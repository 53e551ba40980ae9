"""What must be known of a dataset before anything is trained on it, without reading it where that can be avoided."""

from __future__ import annotations

from dataclasses import dataclass, field

from genmodels.data import DATASETS, DataConfig, Dataset, TextData, open_dataset, uploads
from genmodels.data.text import training_windows, validation_windows
from genmodels.family import DataInfo
from genmodels.storage import Storage


@dataclass(frozen=True)
class Facts:
    """A dataset's shape and size."""

    info: DataInfo
    training: int  # pictures, or characters
    validation: int
    notes: list[str] = field(default_factory=list)  # for people: what was done to the data
    vocabulary: str | None = None  # of a text that was opened

    def examples(self, block_size: int | None) -> tuple[int, int]:
        """Return the examples of training and of validation: pictures, or windows of `block_size` characters."""
        if self.info.kind == "image" or block_size is None:
            return self.training, self.validation
        return training_windows(self.training, block_size), validation_windows(self.validation, block_size)


def facts_of(config: DataConfig, storage: Storage | None, *, open_all: bool) -> Facts:
    """Return what is known of a dataset; a person's own path is always opened.

    Args:
        open_all: open also what is built in or stored, so that it is certain to be there, whole, on this machine.

    Raises:
        DataError: it is missing, damaged, too small or too large.
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
    if validation is None:  # added by a release that did not note it; of classes it may be a few more
        validation = dataset.examples - dataset.examples * 9 // 10
    return Facts(dataset.info, dataset.examples - validation, validation)
