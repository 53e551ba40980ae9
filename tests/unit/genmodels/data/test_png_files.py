"""Test that Pillow reads the PNG files that are written here, with the same pixels."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from genmodels.data.png_files import LEVEL, encode_png


@pytest.mark.parametrize("shape", [(1, 1, 1), (28, 28, 1), (5, 3, 1), (1, 7, 3), (64, 48, 3), (300, 1, 3)])
def test_pillow_reads_the_same_pixels(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for given in (pixels, np.asfortranarray(pixels), pixels[::-1, ::-1]):
        image = Image.open(io.BytesIO(encode_png(given)))
        image.verify()  # the checksum of each chunk
        image = Image.open(io.BytesIO(encode_png(given)))
        assert (image.mode, image.size) == ("L" if shape[2] == 1 else "RGB", shape[1::-1])
        assert np.array_equal(np.asarray(image).reshape(shape), given)


def test_the_file_has_no_optional_part() -> None:
    file = encode_png(np.zeros((2, 3, 1), np.uint8))
    assert [file[at : at + 4] for at in (12, 37, len(file) - 8)] == [b"IHDR", b"IDAT", b"IEND"]
    assert len(file) == 8 + 25 + 12 + len(zlib.compress(bytes(2 * 4), LEVEL)) + 12


def test_a_drawing_is_about_as_small_as_pillows() -> None:
    y, x = np.mgrid[:28, :28]
    digit = (255 * np.exp(-((np.hypot(x - 14, y - 14) - 8) ** 2) / 4)).astype(np.uint8)[:, :, None]
    out = io.BytesIO()
    Image.fromarray(digit[:, :, 0]).save(out, "PNG")
    assert len(encode_png(digit)) < 1.1 * len(out.getvalue())
