"""Write PNG files of 8-bit pixels with zlib alone: small pictures take a tenth of Pillow's time.

The format: https://www.w3.org/TR/png-3/
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

LEVEL = 1  # of zlib; level 6 takes 1.3 to 4 times as long for files that are 1 to 7% smaller
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # grey, RGB


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the PNG file of uint8 pixels (H, W, C), with 1 channel (grey) or 3 (RGB)."""
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of each names its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return b"".join((_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows.data, LEVEL)), _END))


def _chunk(name: bytes, content: bytes) -> bytes:
    content = name + content
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


_END = _chunk(b"IEND", b"")
