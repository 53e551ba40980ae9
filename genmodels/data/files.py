"""Choose the pictures in a folder or zip of the user, and describe the files that are skipped."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NoReturn

from genmodels.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_KINDS = 8  # named in a note
LINK, HIDDEN, SPECIAL = "link", "hidden", "special file"


def find_pictures(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return regular files that look like pictures, in a fixed order, and how many of each kind were skipped.

    Links are not followed, to files or to folders. A hidden folder counts as one.

    Raises:
        DataError: a folder cannot be read.
    """
    paths: list[Path] = []
    skipped: Counter[str] = Counter()

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"data.path: {shown(error.filename)} cannot be read: {error.strerror}")

    for at, folders, names in os.walk(folder, onerror=refuse):
        for name in [*folders, *names]:
            path = Path(at, name)
            mode = path.lstat().st_mode
            if kind := _kind_to_skip(name, mode):
                skipped[kind] += 1
            elif stat.S_ISREG(mode):
                paths.append(path)
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(paths), skipped


def kind_by_name(name: PurePath) -> str | None:
    """Return the kind of a file that is skipped because of its name; None for a picture."""
    if name.name.startswith("."):
        return HIDDEN
    suffix = name.suffix.lower()
    if suffix in SUFFIXES:
        return None
    return shown(suffix)[:20] if len(suffix) > 1 else "without a suffix"


def skipped_note(skipped: Mapping[str, int]) -> str:
    """Return `3 skipped: 2 links, 1 .heic`; "" if no file was skipped."""
    if not skipped:
        return ""
    by_number = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count:,} {kind}{'s' if kind in (LINK, SPECIAL) and count > 1 else ''}" for kind, count in by_number]
    more = ["and other kinds"] if len(named) > MAX_KINDS else []
    return f"{sum(skipped.values()):,} skipped: {', '.join(named[:MAX_KINDS] + more)}"


def shown(path: str | PurePath) -> str:
    """Return a name as one line of text; bytes that are not UTF-8, and control characters, are written as `%E9`."""
    return re.sub(r"[\x00-\x1f\x7f\udc80-\udcff]", lambda match: f"%{ord(match[0]) & 0xFF:02X}", str(path))


def _kind_to_skip(name: str, mode: int) -> str | None:
    if stat.S_ISLNK(mode):
        return LINK
    if stat.S_ISDIR(mode):
        return HIDDEN if name.startswith(".") else None
    if not stat.S_ISREG(mode):
        return SPECIAL
    return kind_by_name(PurePath(name))
