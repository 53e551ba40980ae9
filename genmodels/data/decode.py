"""Decode a picture file, with the same rules for each mode of Pillow in training, in uploads and in requests.

    1, L, LA, La                 grey
    P, PA                        grey if every colour of the palette is grey, else RGB
    RGB, RGBA, RGBa, RGBX        RGB; samples of 16 bits keep the upper 8 bits
    CMYK, YCbCr, LAB, HSV        converted to RGB
    I;16, I;16B, I;16L, I;16N    grey, white is 65,535, or 4,095 if the file has 12 bits a sample
    F                            grey, black is 0 and white is 1; other values are refused
    I                            refused: which of the 4 billion values is white is unknown

Transparent pixels become white, and EXIF's orientation is applied. A file with 16 bits a sample is refused if all its
values fit in 12 bits: read as it is, the picture would be almost black, and such a file can be either a dark picture
or a picture of 12 bits that was never scaled.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genmodels.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # the decoders that may read a file; none runs a program
MAX_PIXELS = 89_000_000  # of one file; Pillow warns above this number
LARGE_PIXELS = 2**22  # a larger picture is decoded alone: each pixel takes about 16 bytes during decoding
TWELVE_BITS = 4095

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF 6.0

_decoding_large = threading.Lock()


def is_grey(image: Image.Image) -> bool:
    """Return whether a picture has no colours, from its header."""
    if image.mode in ("P", "PA"):
        colours = np.array(image.getpalette("RGB") or []).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def check_pixels(image: Image.Image) -> None:
    """Raise DataError if a picture is too large to decode; decodes nothing."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels; save it smaller")


def decode(image: Image.Image) -> Image.Image:
    """Return an opened picture upright, opaque, and in mode L or RGB.

    Raises:
        DataError: the picture is too large, or the range of its values is unknown; the message says what to do.
    """
    check_pixels(image)
    with _decoding_large if image.width * image.height > LARGE_PIXELS else nullcontext():
        # The upright copy no longer has the header of the file.
        white, is_negative, is_deep = _white(image), _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO, _is_deep(image)
        key = image.info.get("transparency")
        upright = ImageOps.exif_transpose(image)
        if image.mode == "I":
            raise DataError("has samples of 32 bits, whose value for white is unknown; save it with 8 or 16 bits")
        if image.mode == "F":
            return _grey(_unit_floats(np.asarray(upright)), 1, is_negative)
        if image.mode.startswith("I;16"):
            values = np.asarray(upright)
            if white > TWELVE_BITS:
                _check_depth(int(values.max()))
            values = np.where(values == key, white, values) if isinstance(key, int) else values
            return _grey(values, white, is_negative)
        if is_deep:
            extrema = np.array(upright.convert("RGB").getextrema())
            _check_depth(int(extrema.max()) * 257)
        return _opaque(upright)


def reason(error: Exception) -> str:
    """Return in a few words why a picture cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def _tag(image: Image.Image, number: int) -> object:
    """Return an entry of a TIFF's header; None in other files."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _white(image: Image.Image) -> int:
    return TWELVE_BITS if _tag(image, BITS_PER_SAMPLE) == 12 else 65535


def _is_deep(image: Image.Image) -> bool:
    """Return whether Pillow drops the lower 8 bits of each sample; for grey pictures it keeps them."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and image.mode != "CMYK"


def _check_depth(brightest: int) -> None:
    if 0 < brightest <= TWELVE_BITS:
        raise DataError(
            "has 16 bits a sample but uses 12 or fewer, so it would be black; save it with 8 bits, "
            "or scale its values to 0 to 65535"
        )


def _unit_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:  # NaN compares as false
        return values
    got = f"got {low:g} to {high:g}" if np.isfinite(values).all() else "some are not finite"
    raise DataError(f"floating-point values must be from 0 to 1, {got}; scale them, or save it with 8 bits")


def _grey(values: np.ndarray, white: int, is_negative: bool) -> Image.Image:
    pixels = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    return Image.fromarray(255 - pixels if is_negative else pixels)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    mode = "L" if is_grey(image) else "RGB"
    if image.has_transparency_data:
        solid = image.convert("RGBA")
        white = Image.new("RGBA", solid.size, "white")
        white.alpha_composite(solid)
        return white.convert(mode)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)
