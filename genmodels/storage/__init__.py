"""Store bytes under keys, in a local folder or an S3-compatible object store, with the same few verbs.

A key is a path of names joined by "/", relative to the storage's root. Objects are replaced whole: a reader sees the
old object or the new one, never a part. A conditional put (`if_absent`, `if_match`) has exactly one winner on both.

Endpoint and credentials of S3 come from the environment alone (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), never from a
URL, so that the author of a spec cannot have requests signed for a host of their choice. For the same reason error
messages name the operation, the object and the kind of failure, and never repeat the message of the client library.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from genmodels.errors import StorageError
from genmodels.storage.base import UNPRINTABLE, Storage, check_key
from genmodels.storage.documents import (
    Document,
    Time,
    decode_floats,
    encode_floats,
    list_names,
    load_document,
    read_document,
    write_document,
)
from genmodels.storage.folder import FolderStorage
from genmodels.storage.instrumented import MeasuredStorage
from genmodels.storage.marker import read_marker
from genmodels.storage.probe import begin_writing, probe_conditional_puts

__all__ = [
    "Document",
    "Storage",
    "Time",
    "begin_writing",
    "decode_floats",
    "encode_floats",
    "list_names",
    "load_document",
    "open_storage",
    "probe_conditional_puts",
    "read_document",
    "read_marker",
    "write_document",
]


def open_storage(url: str, *, in_use: bool = False) -> Storage:
    """Open the storage at `file:///folder` or `s3://bucket/prefix`. Makes no request: errors come on use.

    Args:
        in_use: for a process that continues the work of others (a driver, a worker, a model host): a refusal or a
            missing folder is then an outage from the start, not a mistake of the user.

    Raises:
        StorageError: the URL has another form.
    """
    shown = re.sub("//.*@", "//***@", url.partition("?")[0])  # show no secret from a URL
    scheme, _, rest = url.partition("://")
    if "?" in url or "#" in url:
        raise StorageError(
            f"storage URL {shown!r}: options are not taken from a URL; "
            "set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    path = unquote(rest, errors="surrogateescape")  # a name that is not UTF-8 is refused, not changed
    if scheme == "file" and rest.startswith("/") and not UNPRINTABLE.search(path):
        return MeasuredStorage(FolderStorage(Path(os.path.normpath(path)), in_use), in_use)
    bucket, _, prefix = rest.partition("/")
    if scheme == "s3" and re.fullmatch("[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        from genmodels.storage.s3 import S3Storage  # boto3 takes a quarter of a second to import

        return MeasuredStorage(S3Storage(bucket, check_key(prefix.removesuffix("/")) if prefix else ""), in_use)
    form = "must be file:///absolute/folder or s3://bucket/prefix"
    if re.fullmatch(r"[^:@]+", url):
        form = f"write the folder as {Path(os.path.abspath(os.path.expanduser(url))).as_uri()}"
    raise StorageError(f"storage URL {shown!r}: {form}")
