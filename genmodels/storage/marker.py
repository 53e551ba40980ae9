"""Mark a storage with an id, to recognise it again, and with the format of its content."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from genmodels.errors import Conflict, KeyNotFound, StorageError
from genmodels.storage.base import RESERVED, Storage
from genmodels.storage.documents import parse_object, write_document

MARKER = f"{RESERVED}/marker.json"
FORMAT = 2  # of all stored objects; raised when a release cannot read the objects of an earlier release


@dataclass(frozen=True)
class Marker:
    id: str
    format: int


def read_marker(storage: Storage) -> Marker | None:
    """Return the marker of a storage, None if nothing was written yet. Makes one request; writes nothing.

    Raises:
        StorageError: the marker is damaged, or the storage has another format.
    """
    try:
        return parse_marker(storage.url, storage.get(MARKER)[0])
    except KeyNotFound:
        return None


def mark(storage: Storage) -> Marker:
    """Return the marker of a storage; write it if it is missing."""
    while (marker := read_marker(storage)) is None:
        try:
            write_document(storage, MARKER, {"id": secrets.token_hex(16), "format": FORMAT}, if_absent=True)
        except Conflict:
            continue  # another process wrote first: its marker counts
    return marker


def parse_marker(url: str, data: bytes) -> Marker:
    """Parse a stored marker.

    Raises:
        StorageError: the marker is damaged, or names another format.
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
