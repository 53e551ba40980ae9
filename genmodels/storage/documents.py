"""Write and read JSON objects in storage.

An object may be damaged: empty, cut off, or written by another tool or a newer release. Reading it then raises
DamagedObject, which names the key and the remedy. The error is counted by kind of object and logged once. Code that
lists objects skips damaged ones (`contextlib.suppress(DamagedObject)`) if that loses nothing, so that they do not
affect the others. `list_names` leaves out files of other programs (`.DS_Store`, `x.json.swp`).
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from genmodels.errors import Conflict, DamagedObject, KeyNotFound, StorageUnavailable
from genmodels.metrics import DAMAGED
from genmodels.storage.base import Storage
from genmodels.storage.retry import PassingFailure, retry_passing

MAX_DOCUMENT_BYTES = 32 * 2**20  # larger objects are not documents of genmodels
MAX_DEPTH = 32  # of nested lists and objects
CHUNK_BYTES = 2**20  # of lines that are read at once
_FLAT = frozenset((int, float, str, bool, type(None)))  # types of values in a line
_LOGGED = 1024  # damaged objects that were logged, remembered so that each is logged once

logger = logging.getLogger("genmodels.storage")


class Document(BaseModel):
    """Be the base of objects stored as JSON. Unknown fields are ignored: an older process can read newer documents.

    Attributes:
        object_kind: its name in metrics and in `genmodels doctor`.
        remedy: what to do if it is damaged.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    object_kind: ClassVar[str] = "other"
    remedy: ClassVar[str] = "restore the object from a backup, or delete it"


def _check_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a time zone")
    return text


Time = Annotated[str, AfterValidator(_check_time)]  # as `now` returns it

DocumentT = TypeVar("DocumentT", bound=Document)


def write_document(
    storage: Storage,
    key: str,
    document: Mapping[str, Any],
    *,
    if_absent: bool = False,
    if_match: str | None = None,
    nonce: str | None = None,
) -> str:
    """Store a JSON object and return its etag.

    The body has a nonce, which tells a write of this process whose answer was lost from a write of another process.
    Non-finite floats are stored as "nan", "inf", "-inf".

    Args:
        nonce: a random text, for a caller that calls again with the same document after StorageUnavailable.

    Raises:
        Conflict: another process has written a document under this key.
        StorageUnavailable: the store is unavailable; the document may have been written or not.
    """
    nonce = nonce or secrets.token_hex(16)  # not from `random`, whose state belongs to training
    body = json.dumps({**encode_floats(document), "nonce": nonce}, sort_keys=True, allow_nan=False).encode()

    @retry_passing
    def write() -> str:
        try:
            return storage.put(key, body, if_absent=if_absent, if_match=if_match)
        except (Conflict, StorageUnavailable) as error:
            stored, etag = _find_nonce(storage, key)
            if stored == nonce:
                return etag
            if isinstance(error, Conflict):
                raise
            # The store answers again and does not have the document. If the first put still arrives, one of them fails.
            raise PassingFailure(str(error)) from error

    return write()


def load_document(storage: Storage, key: str, kind: type[DocumentT], **identity: object) -> tuple[DocumentT, str]:
    """Read a document of a kind, and its etag.

    Args:
        identity: fields whose values follow from the key. Other values mean that the object is a copy of another one.

    Raises:
        KeyNotFound: no object has this key.
        DamagedObject: the object is not a document of this kind.
    """
    data, etag = _read(storage, key, kind)
    document = _validate(key, data, etag, kind)
    for name, value in identity.items():
        if getattr(document, name) != value:
            raise damaged(key, f"{name} should be {value!r}: it is a copy of another object", kind, etag)
    return document, etag


def load_if_changed(
    storage: Storage, key: str, kind: type[DocumentT], etag: str | None
) -> tuple[DocumentT, str] | None:
    """Read a document as `load_document` does; return None if it still has the given etag."""
    try:
        answer = storage.get_if_changed(key, etag)
    except DamagedObject as error:
        raise damaged(key, error.what, kind, error.etag) from None
    return (_validate(key, *answer, kind), answer[1]) if answer else None


def read_document(storage: Storage, key: str) -> tuple[dict[str, Any], str]:
    """Read a JSON object of any kind, and its etag. Raises KeyNotFound or DamagedObject."""
    data, etag = _read(storage, key, Document)
    try:
        document = parse_object(data)
    except ValueError as error:
        raise damaged(key, str(error), Document, etag) from None
    document.pop("nonce", None)
    return document, etag


def read_lines(
    storage: Storage, key: str, kind: str, fields: Mapping[str, type], start: int = 0
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield lines of flat JSON objects, each as stored bytes and parsed; skip and count damaged lines.

    Memory is bounded by CHUNK_BYTES, whatever the size of the object.

    Args:
        kind: kind of object, for metrics.
        fields: fields of each row, with their types.
        start: begin with this byte.
    """
    spoiled = 0
    for line in _read_by_line(storage, key, start):
        row = _parse_row(line)
        if row is not None and all(type(row.get(name)) is of for name, of in fields.items()):
            yield line, row
        else:
            spoiled += 1
    if spoiled:
        _report(key, kind, "", f"{key}: damaged ({spoiled} lines are not valid rows); these lines are skipped")


def _read_by_line(storage: Storage, key: str, start: int) -> Iterator[bytes]:
    """Yield the lines of an object; a line that is longer than CHUNK_BYTES is cut."""
    rest = b""
    while chunk := storage.get_range(key, start, CHUNK_BYTES):
        start += len(chunk)
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        if len(rest) >= CHUNK_BYTES:
            whole, rest = whole + newline + rest, b""
        yield from whole.splitlines()
        if len(chunk) < CHUNK_BYTES:
            break
    yield from rest.splitlines()


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a flat JSON object, None for anything else. A history has many rows, so they are not parsed in Python."""
    try:
        row = from_json(line, allow_inf_nan=False)
    except ValueError:
        return None
    if type(row) is not dict or not _FLAT.issuperset(map(type, row.values())):
        return None
    return row if all(_fits(value) for value in row.values() if type(value) is int) else None


def _validate(key: str, data: bytes, etag: str, kind: type[DocumentT]) -> DocumentT:
    try:
        return kind.model_validate(parse_object(data))
    except ValidationError as error:
        raise damaged(key, _first_error(error), kind, etag) from None
    except ValueError as error:
        raise damaged(key, str(error), kind, etag) from None


def _read(storage: Storage, key: str, kind: type[Document]) -> tuple[bytes, str]:
    try:
        return storage.get(key)
    except DamagedObject as error:
        raise damaged(key, error.what, kind, error.etag) from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the bytes are not a JSON object; the message says why in a few words.
    """
    if not data.strip(b"\0 \t\r\n"):
        raise ValueError("it is empty")
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, the limit is {MAX_DOCUMENT_BYTES:,}")
    try:
        document = json.loads(data, parse_int=_int)
        if b"\\u" in data:  # half of a surrogate pair, which JSON can escape but UTF-8 cannot encode
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise ValueError("it is not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("it is JSON, but not an object")
    if _is_deep(document):
        raise ValueError("it is nested too deeply")
    return document


def damaged(key: str, what: str, kind: type[Document], etag: str = "") -> DamagedObject:
    """Return the error for a damaged object; count it, and log it if it is new."""
    error = DamagedObject(key, what, kind.remedy, etag)
    _report(key, kind.object_kind, etag, str(error))
    return error


def list_names(storage: Storage, prefix: str, pattern: str, *, after: str = "", limit: int | None = None) -> list[str]:
    """Return the keys below a prefix without the prefix, sorted, if they match the whole pattern.

    Other keys are skipped: folders, and files that an editor, a desktop or a backup has left.

    Args:
        after: return only names after this one.
        limit: return at most this many names, the first ones.
    """
    matching: list[str] = []
    last = prefix + after if after else ""
    while True:
        keys = storage.list(prefix, after=last, limit=limit)
        names = (key.removeprefix(prefix) for key in keys)
        matching += [name for name in names if re.fullmatch(pattern, name)]
        if limit is None or len(matching) >= limit or len(keys) < limit:
            return matching[:limit]
        last = keys[-1]


def encode_floats(value: Any) -> Any:
    """Return a tree of dicts and lists with "nan", "inf" and "-inf" in place of floats that JSON cannot express."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return _map_tree(encode_floats, value)


def decode_floats(value: Any) -> Any:
    """Undo `encode_floats`. For trees of numbers only: a text "nan" becomes a number too."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return _map_tree(decode_floats, value)


def _find_nonce(storage: Storage, key: str) -> tuple[str | None, str]:
    """Return the nonce in the document under a key, None if it has none, and the etag."""
    try:
        data, etag = storage.get(key)
        return parse_object(data).get("nonce"), etag
    except (KeyNotFound, DamagedObject, ValueError):
        return None, ""


def _map_tree(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: convert(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [convert(item) for item in value]
    return value


def _first_error(error: ValidationError) -> str:
    """Describe the first wrong field, without its value, which may be large or private."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))[:100]
    return f"{where}: {first['msg']}"[:300]


def _int(digits: str) -> int:
    if len(digits) > 20 or not _fits(number := int(digits)):
        raise ValueError("it has a number of more than 64 bits")
    return number


def _fits(number: int) -> bool:
    return -(2**63) <= number < 2**63


def _is_deep(document: dict[str, Any]) -> bool:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


_logged: OrderedDict[tuple[str, str], None] = OrderedDict()


def _report(key: str, kind: str, etag: str, message: str) -> None:
    DAMAGED.labels(kind).inc()
    if (key, etag) in _logged:
        return
    logger.warning("%s", message)
    _logged[key, etag] = None
    while len(_logged) > _LOGGED:
        _logged.popitem(last=False)


def now() -> str:
    """Return the current time in UTC, to the millisecond, in the form of all stored times."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
