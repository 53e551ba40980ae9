"""JSON objects in storage, whose writers know their own work again."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from genmodels.errors import Conflict, KeyNotFound, StorageError, StorageUnavailable
from genmodels.storage.base import PassingFailure, Storage, retry_passing


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


def read_document(storage: Storage, key: str) -> tuple[dict[str, Any], str]:
    """What `write_document` stored, and its etag. Raises KeyNotFound, and StorageError if it is not a JSON object."""
    data, etag = storage.get(key)
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise StorageError(f"{storage.url}/{key}: is damaged, a JSON object should be there")
    document.pop("nonce", None)
    return document, etag


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
        return json.loads(data).get("nonce"), etag
    except (KeyNotFound, ValueError, AttributeError):
        return None, ""


def _map_tree(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: convert(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [convert(item) for item in value]
    return value
