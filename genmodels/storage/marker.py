"""The object by which a storage is known again: an id of its own, and the format in which it is written."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from genmodels.errors import Conflict, KeyNotFound, StorageError
from genmodels.storage.base import RESERVED, Storage
from genmodels.storage.documents import parse_object, write_document

MARKER = f"{RESERVED}/marker.json"
FORMAT = 2  # of all that is stored; raised when a release cannot read what an earlier release has written


@dataclass(frozen=True)
class Marker:
    id: str
    format: int


def read_marker(storage: Storage) -> Marker | None:
    """Return the marker of a storage, None where nothing was written yet. One request; writes nothing.

    Raises:
        StorageError: it is damaged, or the storage is of another format.
    """
    try:
        return parse_marker(storage.url, storage.get(MARKER)[0])
    except KeyNotFound:
        return None


def mark(storage: Storage) -> Marker:
    """Return the marker of a storage; make it, also of one that has content already but no marker."""
    while (marker := read_marker(storage)) is None:
        try:
            write_document(storage, MARKER, {"id": secrets.token_hex(16), "format": FORMAT}, if_absent=True)
        except Conflict:
            continue  # another process is as quick: its marker counts
    return marker


def parse_marker(url: str, data: bytes) -> Marker:
    """Return what `mark` stored.

    Raises:
        StorageError: it is damaged, or names another format.
    """
    try:
        document = parse_object(data)
        marker = Marker(document["id"], document["format"])
        if type(marker.id) is not str or type(marker.format) is not int:
            raise ValueError
    except (ValueError, KeyError):
        raise StorageError(f"{url}/{MARKER}: is damaged; remove it, and the next writer makes a new one") from None
    if marker.format != FORMAT:
        age = "a newer" if marker.format > FORMAT else "an older"
        raise StorageError(
            f"{url}: is written in format {marker.format}, by {age} release of genmodels; this release reads and "
            f"writes format {FORMAT} only: use that release, or choose another storage with --storage"
        )
    return marker
