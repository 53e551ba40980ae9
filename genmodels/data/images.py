"""Read image datasets, decode pictures and draw them. Pixels are stored as uint8 and returned as float32 in [0, 1]."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from genmodels.data.decode import FORMATS, check_pixels, decode, is_grey, reason
from genmodels.data.files import SUFFIXES, find_pictures, shown, skipped_note
from genmodels.data.png_files import encode_png
from genmodels.data.stored_images import IN_MEMORY, Images, StoredImages, blocks, select
from genmodels.errors import DataError, RequestError
from genmodels.family import ImageInfo

MIN_IMAGES = 32
MAX_BYTES = 4 * 2**30  # of a converted dataset
MAX_REQUEST_BYTES = 2**20
REQUEST_FORMATS = ("PNG", "JPEG", "WEBP")
TILE = 112  # smallest side of a tile in a grid, in pixels: pictures of 28 x 28 are enlarged


class ImageData:
    """Hold images of one shape, with or without classes, in a training and a validation part."""

    def __init__(
        self, train: ImageSplit, val: ImageSplit, class_names: Sequence[str] = (), notes: list[str] | None = None
    ) -> None:
        _, channels, height, width = train.images.shape
        self.info = ImageInfo(channels=channels, height=height, width=width, num_classes=len(class_names) or None)
        self.class_names = tuple(class_names)
        self.notes = notes or []
        self._splits: dict[str, ImageSplit] = {"train": train, "val": val}
        digest = hashlib.sha256(json.dumps([train.images.shape, val.images.shape, class_names]).encode())
        for split in (train, val):
            for block in blocks(split.images):
                digest.update(np.ascontiguousarray(block).data)
            if split.labels is not None:
                digest.update(split.labels.astype("<i8").data)
        self.digest = digest.hexdigest()

    def assets(self) -> dict[str, bytes]:
        """Return the files to store in a checkpoint: the names of the classes, if there are any."""
        return {"classes.json": json.dumps(self.class_names, ensure_ascii=False).encode()} if self.class_names else {}

    def preview_file(self, name: str, images: np.ndarray) -> tuple[str, bytes]:
        """Return the name and content of a file that shows images (n, C, H, W), values in [0, 1], as one grid."""
        return f"{name}.png", png(grid(images.clip(0, 1)))

    def arrays(self, name: Literal["train", "val"]) -> dict[str, np.ndarray]:
        """Return all of `train` or `val` as stored: `images` uint8, and `labels` if there are classes."""
        split = self._splits[name]
        images: Any = split.images  # of a large dataset: what indexes like an array
        return {"images": images} | ({} if split.labels is None else {"labels": split.labels})

    def split(self, name: Literal["train", "val"], block_size: int | None = None) -> ImageSplit:
        """Return the images of `train` or `val`; `block_size` is for texts and has no effect."""
        return self._splits[name]


@dataclass(frozen=True)
class ImageSplit:
    """Hold images, uint8 (n, C, H, W), and classes, int64 (n,)."""

    images: Images
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray, epoch: np.ndarray) -> dict[str, np.ndarray]:
        """Return `images` float32 (n, C, H, W) in [0, 1], and `labels` int64 (n,) with classes; index is (n,)."""
        batch = {"images": self.images[index].astype(np.float32) / np.float32(255)}
        return batch if self.labels is None else {**batch, "labels": self.labels[index]}


def from_idx(files: Sequence[bytes], class_names: Sequence[str]) -> ImageData:
    """Read the layout of MNIST (yann.lecun.com/exdb/mnist): train images and labels, test images and labels."""
    parts = []
    for images, labels in (files[:2], files[2:]):
        count, height, width = np.frombuffer(images, ">u4", count=3, offset=4)
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(count, 1, height, width)
        parts.append(ImageSplit(pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)))
    return ImageData(parts[0], parts[1], class_names)


def from_csv(content: bytes, class_names: Sequence[str]) -> ImageData:
    """Read square grey images, one per line: the pixels row by row, then the class. A tenth of each class is val."""
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8)
    side = round((table.shape[1] - 1) ** 0.5)
    images, labels = table[:, :-1].reshape(-1, 1, side, side), table[:, -1].astype(np.int64)
    return train_val_split(Pictures(images, labels, list(class_names), []))


@dataclass(frozen=True)
class Pictures:
    """Hold pictures of one size before the split: uint8 (n, C, side, side), classes int64 (n,) or None."""

    images: Images
    labels: np.ndarray | None
    class_names: list[str]
    notes: list[str]  # for the user: what was done to the pictures


def read_folder(
    folder: Path,
    image_size: int,
    channels: int | None,
    skipped: Mapping[str, int] | None = None,
    *,
    in_memory: bool = False,
) -> Pictures:
    """Read the pictures in a folder and its subfolders, scaled and centre-cropped to a square.

    Above `IN_MEMORY` bytes they are decoded each time when they are used.

    The folders of the first level are the classes if there are at least two and no picture is outside of them.
    `channels` None: 1 if every picture is stored in grey, else 3.

    Args:
        skipped: how many files of each kind were skipped before, for the notes.
        in_memory: decode all of them now, to write them to one file.

    Raises:
        DataError: no or too few pictures, or pictures that cannot be read (the message names them).
    """
    paths, passed_over = find_pictures(folder)
    left_out = skipped_note(Counter(skipped or {}) + passed_over)
    if not paths:
        kinds = " ".join(sorted(SUFFIXES))
        also = f"; {left_out}" if left_out else ""
        raise DataError(
            f"data.path: {shown(folder)} has no pictures (searched for {kinds}, also in its subfolders{also})"
        )
    if len(paths) < MIN_IMAGES:
        also = f" ({left_out})" if left_out else ""
        raise DataError(
            f"data.path: {shown(folder)} has too few pictures to train on: {len(paths)}{also}; "
            f"add pictures, at least {MIN_IMAGES} are needed"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL while it decodes
        headers = _all_readable(paths, list(pool.map(_header, paths)))
        if channels is None:
            channels = 1 if all(header.is_grey for header in headers) else 3
        shape = (channels, image_size, image_size)
        if (needed := len(paths) * math.prod(shape)) > MAX_BYTES and in_memory:
            raise DataError(
                f"data.path: {len(paths):,} pictures at image_size {image_size} need {needed:,} bytes, "
                f"at most {MAX_BYTES:,} (4 GiB) fit: lower data.image_size"
            )
    squares: Images = StoredImages(partial(_decode, paths, shape), np.arange(len(paths)), shape)
    if in_memory or needed <= IN_MEMORY:
        squares = squares[:]
    classes, labels = _classes(folder, paths)
    colours = "grey" if channels == 1 else "RGB"
    notes = [f"{shown(folder.resolve().name)}: {len(paths):,} pictures as {colours} {image_size} x {image_size}"]
    if scaled := sum(header.size != (image_size, image_size) for header in headers):
        notes[0] += f", {scaled:,} of them scaled and centre-cropped"
    if small := sum(min(header.size) < image_size for header in headers):
        notes.append(f"{small:,} smaller than that, enlarged; a lower data.image_size keeps them sharp")
    if animated := sum(header.has_more for header in headers):
        notes.append(f"{animated:,} with several pages or frames, of which the first is used")
    if classes:
        named = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        notes.append(f"{len(classes)} classes, one for each folder: {named}")
    if left_out:
        notes.append(left_out)
    return Pictures(squares, labels, classes, notes)


def train_val_split(pictures: Pictures) -> ImageData:
    """Split pictures: a tenth of each class, at least one image, with the lowest sha256, is for validation.

    So the split depends only on the pictures: copies of a picture stay in one part, and added pictures move few others.
    """
    images, labels = pictures.images, pictures.labels
    digests = [hashlib.sha256(image).digest() for block in blocks(images) for image in block]
    groups = np.zeros(len(images), np.int64) if labels is None else labels
    val: list[int] = []
    for group in np.unique(groups):
        members = sorted(np.flatnonzero(groups == group).tolist(), key=lambda place: digests[place])
        val += members[: max(1, len(members) // 10) if len(members) > 1 else 0]
    is_val = np.isin(np.arange(len(images)), val)
    train, held = (
        ImageSplit(select(images, part), None if labels is None else labels[part]) for part in (~is_val, is_val)
    )
    return ImageData(train, held, pictures.class_names, pictures.notes)


def decode_image(content: bytes, info: ImageInfo) -> np.ndarray:
    """Decode a picture from a request: float32 (C, H, W) in [0, 1], upright, in the channels of the model.

    Its size is read before it is decoded, and must be the size of the model: the caller chooses how to scale.

    Raises:
        RequestError: not PNG, JPEG or WebP, damaged, of another size (400), or too many bytes (413).
    """
    if len(content) > MAX_REQUEST_BYTES:
        message = f"image has {len(content):,} bytes, the limit is {MAX_REQUEST_BYTES:,}"
        raise RequestError(message, param="image", status=413)
    wanted = (info.width, info.height)
    try:
        with Image.open(io.BytesIO(content), formats=REQUEST_FORMATS) as image:
            size = image.size
            if size in (wanted, wanted[::-1]):  # swapped if EXIF turns it by 90 degrees
                upright = decode(image)
                size = upright.size
            if size == wanted:
                return _pixels(upright, info.channels).astype(np.float32) / np.float32(255)
    except Exception as error:  # Pillow raises many types of errors on damaged bytes
        raise RequestError(f"image cannot be read as PNG, JPEG or WebP: {reason(error)}", param="image") from error
    message = f"image is {size[0]} x {size[1]}, this model takes {info.width} x {info.height}"
    raise RequestError(f"{message}: scale or crop it before sending", param="image")


def png(image: np.ndarray, scale: int = 1) -> bytes:
    """Return a PNG file of float pixels in [0, 1], or of the uint8 result of `pixels_of`.

    The shape is (C, H, W) with 1 or 3 channels, or (H, W). Each pixel is drawn `scale` x `scale`.
    """
    planes = image[None] if image.ndim == 2 else image
    pixels = planes if planes.dtype == np.uint8 else pixels_of(planes)
    if scale > 1:
        pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    return encode_png(pixels.transpose(1, 2, 0))


def pixels_of(images: np.ndarray) -> np.ndarray:
    """Convert floats in [0, 1] to uint8 of any shape; many images at once cost little more than one."""
    return np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int | None = None, padding: int = 8) -> np.ndarray:
    """Arrange images in one picture: (n, C, H, W) -> (C, H', W'), as square as possible by default.

    Small images are enlarged by a whole factor, without smoothing; the `padding` pixels between images are white.
    """
    n, channels, height, width = images.shape
    columns = columns or int(np.ceil(n**0.5))
    rows = -(-n // columns)
    factor = max(1, -(-TILE // max(height, width)))
    tiles = images.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = tiles.shape[2] + padding, tiles.shape[3] + padding
    white = 255 if images.dtype == np.uint8 else 1
    canvas = np.full((channels, rows * height + padding, columns * width + padding), white, images.dtype)
    for place, tile in enumerate(tiles):
        top, left = padding + place // columns * height, padding + place % columns * width
        canvas[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return canvas


def _classes(folder: Path, paths: Sequence[Path]) -> tuple[list[str], np.ndarray | None]:
    parts = [path.relative_to(folder).parts for path in paths]
    names = sorted({part[0] for part in parts})
    if len(names) < 2 or any(len(part) == 1 for part in parts):
        return [], None
    places = {name: place for place, name in enumerate(names)}
    return [shown(name) for name in names], np.array([places[part[0]] for part in parts], np.int64)


def _all_readable(paths: Sequence[Path], results: list[Any]) -> list[Any]:
    bad = [f"{shown(path)} ({result})" for path, result in zip(paths, results, strict=True) if isinstance(result, str)]
    if bad:
        raise DataError(
            f"data.path: {len(bad):,} of {len(paths):,} pictures cannot be read: {'; '.join(bad[:3])}"
            + ("; ..." if len(bad) > 3 else "")
            + ". Remove them or save them again"
        )
    return results


@dataclass(frozen=True)
class _Header:
    is_grey: bool
    size: tuple[int, int]
    has_more: bool  # pages or frames after the first


def _header(path: Path) -> _Header | str:
    """Return the facts in the header of a picture, or what is wrong with it."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_pixels(image)
            size = image.size
            return _Header(is_grey(image), size, bool(getattr(image, "is_animated", False)))
    except Exception as error:  # Pillow raises many types of errors on damaged files
        return reason(error)


def _decode(paths: Sequence[Path], shape: tuple[int, int, int], rows: np.ndarray) -> np.ndarray:
    """Decode some of the pictures: integers (m,) -> uint8 (m, C, side, side). Raises DataError."""
    chosen, squares = [paths[row] for row in rows], np.empty((len(rows), *shape), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        _all_readable(chosen, list(pool.map(_fill, chosen, squares)))
    return squares


def _fill(path: Path, target: np.ndarray) -> str | None:
    """Put the largest centred square of a picture, scaled, into `target`, uint8 (channels, side, side).

    Returns:
        What is wrong with the picture; None if it could be read.
    """
    channels, side, _ = target.shape
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            upright = decode(image)
            if upright.size != (side, side):
                upright = ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS)
            target[:] = _pixels(upright, channels)
    except Exception as error:  # Pillow raises many types of errors on damaged files
        return reason(error)
    return None


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
