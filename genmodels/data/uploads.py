"""Store datasets of users, for clusters that do not have the paths of the user: `genmodels data add`.

    datasets/<name>/<sha256>/text.txt              the unchanged text, or
                            /pictures.safetensors  converted once: `images`, and `labels` if there are classes
                            /dataset.json          its description; written last, then the content exists
    datasets/<name>/current.json                   the content that the name means now
    datasets/<name>/gc-lease.json                  lease of the process that deletes the dataset

A content never changes and is named by the sha256 of its file. A spec is pinned to one content when it is submitted, so
adding another content under the same name changes no run. A process that deletes holds the lease of the dataset; a
process that adds waits for the lease afterwards, and stores missing objects again. Downloads are kept in
`sources.cache_folder()` and verified at each use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from pydantic import Field

from genmodels.data.files import shown
from genmodels.data.images import ImageData, Pictures, read_folder, train_val_split
from genmodels.data.sources import DATASETS, cache_folder
from genmodels.data.stored_images import IN_MEMORY, Images, StoredImages
from genmodels.data.text import TextData, read_text
from genmodels.data.unpack import is_zip, unpack
from genmodels.errors import Conflict, DamagedObject, DataError, DatasetExists, KeyNotFound
from genmodels.family import DataInfo
from genmodels.schema.field_errors import as_label
from genmodels.storage import Document, Storage, Time, load_document, write_document
from genmodels.storage.disk import disk_outages
from genmodels.storage.lease import Lease

NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
IMAGE_SIZE, MIN_SIZE, MAX_SIZE = 32, 8, 256  # side of the squares that pictures become, in pixels
MAX_STREAM_BYTES = 2**30  # of an uploaded file
GC_LEASE, GC_SECONDS = "gc-lease.json", 120.0  # after which a process that deletes counts as dead

Kind = Literal["image", "text"]
UNPACKED = "unpacked"
FILES: dict[Kind, str] = {"text": "text.txt", "image": "pictures.safetensors"}


class StoredDataset(Document):
    """Describe one content of an added dataset."""

    object_kind = "dataset"
    remedy = "delete its folder and add the dataset again: genmodels data add"

    name: str
    sha256: str
    kind: Kind
    bytes: int
    examples: int  # pictures, or characters
    validation: int | None = None  # examples for validation, included in `examples`
    digest: str = ""  # of the data as training sees it, as in the lineage of a checkpoint
    info: DataInfo  # the facts that a family needs
    notes: list[str]  # for the user: number, size and conversion of the pictures
    added: Time

    @property
    def key(self) -> str:
        return f"datasets/{self.name}/{self.sha256}/{FILES[self.kind]}"


class Current(Document):
    """Name the current content of a dataset."""

    object_kind = "dataset"
    remedy = "add the dataset again: genmodels data add"

    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def add(
    storage: Storage,
    name: str,
    path: Path,
    image_size: int | None = None,
    channels: Literal[1, 3] | None = None,
    *,
    replace: bool = False,
) -> tuple[StoredDataset, bool]:
    """Check a text file, or a folder or zip of pictures, with the rules for local data, and store it under a name.

    Args:
        image_size, channels: of pictures, as in the `data` section of a spec.
        replace: replace another content of this name.

    Returns:
        The dataset, and whether it is new: adding the same content under the same name changes nothing.

    Raises:
        DatasetExists: the name has another content, and `replace` is False.
        DataError: the name is invalid, the data is unsuitable, or the name belongs to a dataset of another kind.
    """
    _check_name(name, "choose another name")
    if image_size is not None and not MIN_SIZE <= image_size <= MAX_SIZE:
        raise DataError(f"image_size: got {image_size}, expected {MIN_SIZE} to {MAX_SIZE} pixels")
    with disk_outages(), tempfile.TemporaryDirectory(prefix="genmodels-add-") as scratch:
        try:
            dataset, file = _convert(name, path, image_size, channels, Path(scratch))
        except DataError as error:
            message = str(error).removeprefix("data.path: ").replace("data.image_size", "image_size")
            raise DataError(message.replace(f"{scratch}/{UNPACKED}", shown(path.name))) from None
        except OSError as error:
            raise DataError(f"{shown(error.filename or path)} cannot be read: {error.strerror}") from error
        before = None
        with contextlib.suppress(DamagedObject):  # adding it again repairs it
            before = current(storage, name)
        if before and before.kind != dataset.kind:
            raise DataError(
                f"{name!r} is a dataset of {before.kind}s, but this one has {dataset.kind}s: choose another name"
            )
        if before and before.sha256 == dataset.sha256:
            return before, False
        if before and not replace:
            raise DatasetExists(f"dataset {name!r} exists with another content: {before.notes[0]}")
        _put(storage, dataset, file)
        while True:
            write_document(storage, f"datasets/{name}/current.json", {"sha256": dataset.sha256, "time": _now()})
            gc_lease(storage, name).wait_until_free()
            if current(storage, name) and storage.exists(dataset.key):
                return find(storage, name, dataset.sha256), True
            _put(storage, dataset, file)  # it was deleted in the meantime, completely or partly


def _put(storage: Storage, dataset: StoredDataset, file: Path) -> None:
    document = f"datasets/{dataset.name}/{dataset.sha256}/dataset.json"
    if not (storage.exists(document) and storage.exists(dataset.key)):
        storage.upload(file, dataset.key)
        with contextlib.suppress(Conflict):  # another process has just added the same
            write_document(storage, document, dataset.model_dump(mode="json"), if_absent=True)


def gc_lease(storage: Storage, name: str) -> Lease:
    """Return the lease for deleting a dataset."""
    return Lease(storage, GC_SECONDS, f"datasets/{name}/{GC_LEASE}")


def sizes(storage: Storage, name: str) -> dict[str, int]:
    """Return the bytes of every object of a dataset: the current content first, then the descriptions, then the data.

    A deletion in this order never leaves an incomplete content that looks complete.

    Raises:
        DataError: the name is invalid.
    """
    _check_name(name, "only added datasets can be deleted")
    objects = storage.sizes(f"datasets/{name}/")
    order = {"current.json": 0, "dataset.json": 1}
    keys = sorted(objects, key=lambda key: (order.get(key.rpartition("/")[2], 2), key))
    return {key: objects[key] for key in keys if not key.endswith(f"/{GC_LEASE}")}


def contents(storage: Storage, name: str) -> list[StoredDataset]:
    """Return all contents that a name has or had."""
    described = (_described(storage, name, sha256) for sha256 in storage.folders(f"datasets/{name}/"))
    return [dataset for dataset in described if dataset]


def find(storage: Storage, name: str, sha256: str | None = None) -> StoredDataset:
    """Return a content of an added dataset; without `sha256` the current one.

    Raises:
        DataError: the dataset or the content does not exist.
    """
    if not re.fullmatch(NAME, name) or (sha256 and not re.fullmatch("[0-9a-f]{64}", sha256)):
        raise DataError(f"no dataset {name!r}: a name has lower-case letters, digits and dashes")
    dataset = _described(storage, name, sha256) if sha256 else current(storage, name)
    if dataset:
        return dataset
    what = f"dataset {name!r}" + (f" has no content {sha256[:12]}..." if sha256 else " is not in the storage")
    raise DataError(f"data.dataset: {what} ({storage.url}); add it: genmodels data add {name} FILE|FOLDER")


def load(name: str, sha256: str | None, storage: Storage | None) -> ImageData | TextData:
    """Open an added dataset, from the cache of this machine if possible.

    Args:
        storage: may be None if `sha256` is given and its content is in the cache.

    Raises:
        DataError: the dataset is missing, or damaged in the storage.
    """
    if sha256 is None:
        if storage is None:
            raise DataError(
                f"data.dataset: {name!r} is not a built-in dataset, and no storage is given; give --storage"
            )
        sha256 = find(storage, name).sha256
    folder = cache_folder() / "datasets" / sha256
    path = _cached(folder, sha256)
    if path is None:
        if storage is None:
            raise DataError(f"data.dataset: {name!r} is not on this machine, and no storage is given; give --storage")
        path = _fetch(storage, find(storage, name, sha256), folder)
    if path.name == FILES["image"]:
        return train_val_split(_read_pictures(path, name))
    text = read_text(path)
    text.notes = [note.replace(path.name, name, 1) for note in text.notes]
    return text


def _convert(
    name: str, path: Path, image_size: int | None, channels: Literal[1, 3] | None, scratch: Path
) -> tuple[StoredDataset, Path]:
    """Return the description of a file or folder to store, and the file that holds its content."""
    if not path.exists():
        raise DataError(f"{shown(path)} does not exist: name a text file, a folder of pictures, or a zip of them")
    if path.is_dir() or (path.is_file() and is_zip(path)):
        folder, skipped = (path, None) if path.is_dir() else unpack(path, scratch / UNPACKED)
        pictures = read_folder(folder, image_size or IMAGE_SIZE, channels, skipped, in_memory=True)
        file = scratch / FILES["image"]
        _write_pictures(pictures, file)
        data = train_val_split(pictures)
        info: DataInfo = data.info
        validation = len(data.split("val"))
        digest, examples, kind = data.digest, len(pictures.images), "image"
        notes, called = pictures.notes, shown(folder.resolve().name)
    elif image_size or channels:
        raise DataError(f"{shown(path)} is not a folder or zip of pictures: remove image_size and channels")
    else:
        text, file, kind = read_text(path), path, "text"
        info, digest, examples = text.info, text.digest, len(text.train) + len(text.val)
        validation = len(text.val)
        notes, called = text.notes, shown(path.name)
    dataset = StoredDataset(
        name=name,
        sha256=_sha256(file),
        kind=kind,
        bytes=file.stat().st_size,
        examples=examples,
        validation=validation,
        digest=digest,
        info=info,
        notes=[notes[0].removeprefix(f"{called}: "), *notes[1:]],
        added=_now(),
    )
    return dataset, file


def _write_pictures(pictures: Pictures, path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {"images": pictures.images[:]} | ({} if pictures.labels is None else {"labels": pictures.labels})
    # One entry: with several, their order in the file is not fixed, and so neither is the sha256.
    save_file(tensors, path, {"class_names": json.dumps(pictures.class_names)})


def _read_pictures(path: Path, name: str) -> Pictures:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118  no mapping
        class_names: list[str] = json.loads(file.metadata()["class_names"])
        count, channels, height, width = shape = file.get_slice("images").get_shape()
        images: Images = StoredImages(_mapped(path, shape).__getitem__, np.arange(count), (channels, height, width))
        if math.prod(shape) <= IN_MEMORY:
            images = images[:]
    note = f"{name}: {count:,} pictures as {'grey' if channels == 1 else 'RGB'} {width} x {height}"
    if class_names:
        note += f", {len(class_names)} classes"
    return Pictures(images, labels, class_names, [note])


def _mapped(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Map the images of a file into memory: uint8 (n, C, H, W)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(size))["images"]["data_offsets"]
    return np.memmap(path, np.uint8, "r", 8 + size + begin, tuple(shape)).view(np.ndarray)


def _fetch(storage: Storage, dataset: StoredDataset, folder: Path) -> Path:
    """Download to the cache, where only complete and verified files appear; one process downloads, others wait."""
    path = folder / FILES[dataset.kind]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if cached := _cached(folder, dataset.sha256):
                return cached
            path.unlink(missing_ok=True)
            part = path.with_name(f".{path.name}.part")
            storage.download(dataset.key, part)
            if _sha256(part) != dataset.sha256:
                part.unlink()
                raise DataError(
                    f"data.dataset: {dataset.name!r} is damaged in the storage ({storage.url}/{dataset.key}): remove "
                    f"that folder and add it again: genmodels data add {dataset.name} FILE|FOLDER"
                )
            return part.replace(path)
    except KeyNotFound:
        raise DataError(f"data.dataset: {storage.url}/{dataset.key} is gone; add the dataset again") from None
    except OSError as error:
        where = "set XDG_CACHE_HOME to another folder"
        raise DataError(f"data.dataset: {folder} cannot be written ({error.strerror}); {where}") from error


def _cached(folder: Path, sha256: str) -> Path | None:
    paths = (folder / file for file in FILES.values())
    return next((path for path in paths if path.is_file() and _sha256(path) == sha256), None)


def current(storage: Storage, name: str) -> StoredDataset | None:
    """Return the current content of a dataset. Raises DamagedObject."""
    try:
        meaning, _ = load_document(storage, f"datasets/{name}/current.json", Current)
    except KeyNotFound:
        return None
    return _described(storage, name, meaning.sha256)


def _described(storage: Storage, name: str, sha256: str) -> StoredDataset | None:
    try:
        key = f"datasets/{name}/{sha256}/dataset.json"
        return load_document(storage, key, StoredDataset, name=name, sha256=sha256)[0]
    except KeyNotFound:
        return None


def _check_name(name: str, remedy: str) -> None:
    """Raise DataError unless an added dataset may have this name; `remedy` is for the name of a built-in dataset."""
    if not re.fullmatch(NAME, name):
        rule = "expected at most 63 lower-case letters, digits and '-', with no '-' at the ends"
        near = as_label(name)
        raise DataError(f"dataset name: got {name[:70]!r}, {rule}" + (f"; write e.g. {near}" if near else ""))
    if name in DATASETS:
        raise DataError(f"dataset name: {name!r} is a built-in dataset; {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
