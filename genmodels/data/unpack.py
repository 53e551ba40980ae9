"""Zips of pictures from people, unpacked so that nothing lands outside and nothing grows without end."""

from __future__ import annotations

import lzma
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from genmodels.data.images import SUFFIXES
from genmodels.errors import DataError

MAX_FILES = 500_000
MAX_DIRECTORY_BYTES = 2**26  # of the list of names, which is read whole
MAX_BYTES = 8 * 2**30  # unpacked


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def unpack(path: Path, folder: Path) -> Path:
    """Unpack the pictures of a zip into a new folder; other files, hidden ones and links are passed over.

    Returns:
        The folder, or the one inside it that holds everything.

    Raises:
        DataError: it is damaged, encrypted, too large, or a name in it leads out of the folder.
    """
    folder.mkdir()
    damaged = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
    try:
        with path.open("rb") as file:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # what ZipFile will go by
            if end and end[5] > MAX_DIRECTORY_BYTES:
                raise DataError(f"{path} has too many files, at most {MAX_FILES:,} are unpacked")
            with zipfile.ZipFile(file) as archive:
                _extract(archive, path, folder)
    except damaged as error:
        raise DataError(f"{path} cannot be read as a zip: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be unpacked: {error.strerror}") from error
    while len(inner := list(folder.iterdir())) == 1 and inner[0].is_dir():
        folder = inner[0]
    return folder


def _extract(archive: zipfile.ZipFile, path: Path, folder: Path) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_FILES:
        raise DataError(f"{path} has {len(entries):,} files, at most {MAX_FILES:,} are unpacked")
    left = MAX_BYTES
    for entry in entries:
        name = PurePosixPath(entry.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in name.as_posix().partition("/")[0]:
            raise DataError(f"{path}: the name {entry.filename[:100]!r} in it leads out of its folder; pack it anew")
        if not _is_picture(entry, name):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, target.open("xb") as out:
            while part := source.read(2**20):  # counted as they come: what the header promises may be untrue
                left -= len(part)
                if left < 0:
                    raise DataError(f"{path} unpacks to more than {MAX_BYTES:,} bytes; bring fewer or smaller pictures")
                out.write(part)


def _is_picture(entry: zipfile.ZipInfo, name: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    is_link = stat.S_ISLNK(entry.external_attr >> 16)
    is_folder = entry.filename.endswith("/")  # is_dir() breaks on the empty name that one beginning with NUL becomes
    return not (is_folder or hidden or is_link) and name.suffix.lower() in SUFFIXES
