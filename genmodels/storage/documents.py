"""JSON objects in storage: the one way they are written and read.

An object may be damaged: empty, cut off, another tool's, a newer release's. Whatever is wrong with it, reading it
raises DamagedObject, which names the key and the remedy. It is counted by kind of object and logged once. Code that
lists objects skips a damaged one (`contextlib.suppress(DamagedObject)`) where nothing is lost by that, so that it is in
the way of no other; files that are not ours (`.DS_Store`, `x.json.swp`) are left out by `list_names`.
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

from genmodels.errors import Conflict, DamagedObject, KeyNotFound, StorageUnavailable
from genmodels.metrics import DAMAGED
from genmodels.storage.base import Storage
from genmodels.storage.retry import PassingFailure, retry_passing

MAX_DOCUMENT_BYTES = 32 * 2**20  # the largest that is read: a larger one is no document of ours
MAX_DEPTH = 32  # of lists and objects in each other
_LOGGED = 1024  # damaged objects that were logged, remembered so that each is logged once

logger = logging.getLogger("genmodels.storage")


class Document(BaseModel):
    """An object stored as JSON. Unknown fields are ignored: an older process reads what a newer one wrote.

    Attributes:
        object_kind: what it is called in metrics and in `genmodels doctor`.
        remedy: what to do about one that is damaged.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    object_kind: ClassVar[str] = "other"
    remedy: ClassVar[str] = "restore the object from a backup, or delete it"


def _check_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Time = Annotated[str, AfterValidator(_check_time)]  # as `run.now` writes it

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
    """Store a JSON object and return its etag; tells an own write whose answer was lost from somebody else's.

    The body carries a nonce that marks the writer. Non-finite floats are stored as "nan", "inf", "-inf".

    Args:
        nonce: random, of the caller's making, for one who calls again with the same document after StorageUnavailable.

    Raises:
        Conflict: somebody else's document stands there.
        StorageUnavailable: the store went away; the document may or may not have been written.
    """
    nonce = nonce or secrets.token_hex(16)  # not from `random`, whose state belongs to the training run
    body = json.dumps({**encode_floats(document), "nonce": nonce}, sort_keys=True, allow_nan=False).encode()

    @retry_passing
    def write() -> str:
        try:
            return storage.put(key, body, if_absent=if_absent, if_match=if_match)
        except (Conflict, StorageUnavailable) as error:
            found, etag = _find_nonce(storage, key)
            if found == nonce:
                return etag
            if isinstance(error, Conflict):
                raise
            # The store answers again and has not got it. Should the first put still arrive, one of the two loses.
            raise PassingFailure(str(error)) from error

    return write()


def load_document(storage: Storage, key: str, kind: type[DocumentT], **identity: object) -> tuple[DocumentT, str]:
    """Read a document of a kind, and its etag.

    Args:
        identity: fields whose values follow from the key. Others mean that the object is a copy of another one.

    Raises:
        KeyNotFound
        DamagedObject: the object is not such a document.
    """
    data, etag = _read(storage, key, kind)
    try:
        document = kind.model_validate(parse_object(data))
    except ValidationError as error:
        raise damaged(key, _first_problem(error), kind, etag) from None
    except ValueError as error:
        raise damaged(key, str(error), kind, etag) from None
    for name, value in identity.items():
        if getattr(document, name) != value:
            raise damaged(key, f"{name} should be {value!r}: it is a copy of another object", kind, etag)
    return document, etag


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
    storage: Storage, key: str, kind: str, fields: Mapping[str, type]
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Read lines of flat JSON objects, each as it is stored and parsed; damaged lines are left out and counted.

    Args:
        kind: of object, in metrics.
        fields: that each row has, with their types.
    """
    try:
        data, etag = storage.get(key)
    except DamagedObject as error:
        _report(key, kind, error.etag, f"{error}; it is left out")
        return
    spoiled = 0
    for line in data.splitlines():
        try:
            row = parse_object(line)
        except ValueError:
            spoiled += 1
            continue
        flat = not any(isinstance(value, (dict, list)) for value in row.values())
        if flat and all(type(row.get(name)) is of for name, of in fields.items()):
            yield line, row
        else:
            spoiled += 1
    if spoiled:
        _report(key, kind, etag, f"{key}: damaged ({spoiled} lines are no rows of ours); they are left out")


def _read(storage: Storage, key: str, kind: type[Document]) -> tuple[bytes, str]:
    try:
        return storage.get(key)
    except DamagedObject as error:
        raise damaged(key, error.what, kind, error.etag) from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is none; the message says why in a few words.
    """
    if not data.strip(b"\0 \t\r\n"):
        raise ValueError("it is empty")
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, {MAX_DOCUMENT_BYTES:,} are the most that is read")
    try:
        document = json.loads(data, parse_int=_int)
        if b"\\u" in data:  # half of a character that JSON can escape, and UTF-8 has no form for
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
    """Make the error for a damaged object; count it, and log it if it is new."""
    error = DamagedObject(key, what, kind.remedy, etag)
    _report(key, kind.object_kind, etag, str(error))
    return error


def list_names(storage: Storage, prefix: str, pattern: str, *, after: str = "", limit: int | None = None) -> list[str]:
    """List what lies below a prefix by the rest of the keys, sorted: those alone that match a pattern as a whole.

    Whatever else lies there is not ours: files that an editor, a desktop or a backup left, and folders.

    Args:
        after: only names behind this one.
        limit: at most so many, the first ones.
    """
    found: list[str] = []
    last = prefix + after if after else ""
    while True:
        keys = storage.list(prefix, after=last, limit=limit)
        names = (key.removeprefix(prefix) for key in keys)
        found += [name for name in names if re.fullmatch(pattern, name)]
        if limit is None or len(found) >= limit or len(keys) < limit:
            return found[:limit]
        last = keys[-1]


def encode_floats(value: Any) -> Any:
    """The same tree of dicts and lists with "nan", "inf" and "-inf" for floats that JSON has no form for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return _map_tree(encode_floats, value)


def decode_floats(value: Any) -> Any:
    """Undo `encode_floats`. For trees of numbers only: a text that happens to be "nan" becomes a number too."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return _map_tree(decode_floats, value)


def _find_nonce(storage: Storage, key: str) -> tuple[str | None, str]:
    """The nonce in the document under a key, None where there is none, and the etag."""
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


def _first_problem(error: ValidationError) -> str:
    """Describe the first of the fields that are wrong, without its value, which may be large or private."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))[:100]
    return f"{where}: {first['msg']}"[:300]


def _int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError("a number of more than 64 bits")
    return number


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
    """UTC, to the millisecond, as stored everywhere."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
