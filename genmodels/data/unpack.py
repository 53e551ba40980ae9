"""Unpack zips of pictures safely: no file outside the folder, and a limited size."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

from genmodels.data.files import HIDDEN, LINK, kind_by_name
from genmodels.errors import DataError

MAX_FILES = 500_000
MAX_DIRECTORY_BYTES = 2**26  # of the list of names, which is read at once
MAX_BYTES = 8 * 2**30  # unpacked


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip, or should be one, by its first bytes or its name."""
    with path.open("rb") as file:
        start = file.read(4)
    # first bytes of a zip with files, of an empty zip, and of a cut or split zip
    return start in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK") or path.suffix.lower() == ".zip"


def unpack(path: Path, folder: Path) -> tuple[Path, Counter[str]]:
    """Unpack the pictures of a zip into a new folder; other files, hidden ones and links are skipped.

    Returns:
        The folder, or the only folder inside it; and how many files of each kind were skipped.

    Raises:
        DataError: the zip is damaged, encrypted or too large, or a file name in it is outside the folder.
    """
    folder.mkdir()
    damaged = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
    try:
        with path.open("rb") as file:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # ZipFile reads these values
            if end and end[5] > MAX_DIRECTORY_BYTES:
                raise DataError(f"{path} has too many files, the limit is {MAX_FILES:,}; use fewer pictures")
            with zipfile.ZipFile(file) as archive:
                skipped = _extract(archive, path, folder)
    except damaged as error:
        raise DataError(f"{path} cannot be read as a zip: {error}; pack it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be unpacked: {error.strerror}") from error
    while len(inner := list(folder.iterdir())) == 1 and inner[0].is_dir():
        folder = inner[0]
    return folder, skipped


def _extract(archive: zipfile.ZipFile, path: Path, folder: Path) -> Counter[str]:
    entries = archive.infolist()
    if len(entries) > MAX_FILES:
        raise DataError(f"{path} has {len(entries):,} files, the limit is {MAX_FILES:,}; use fewer pictures")
    left, skipped = MAX_BYTES, Counter[str]()
    for entry in entries:
        name = PurePosixPath(entry.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in name.as_posix().partition("/")[0]:
            raise DataError(f"{path}: the file {entry.filename[:100]!r} would be outside its folder; pack it again")
        if entry.filename.endswith("/"):  # is_dir() fails on the empty name that results from a name beginning with NUL
            continue
        if kind := _kind_to_skip(entry, name):
            skipped[kind] += 1
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, target.open("xb") as out:
            while part := source.read(2**20):  # counted while unpacking: the size in the header may be wrong
                left -= len(part)
                if left < 0:
                    raise DataError(f"{path} unpacks to more than {MAX_BYTES:,} bytes; use fewer or smaller pictures")
                out.write(part)
    return skipped


def _kind_to_skip(entry: zipfile.ZipInfo, name: PurePosixPath) -> str | None:
    if stat.S_ISLNK(entry.external_attr >> 16):
        return LINK
    if any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
        return HIDDEN
    return kind_by_name(name)
