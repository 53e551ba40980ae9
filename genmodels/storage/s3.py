"""Implement a storage in a bucket of an S3-compatible store; the only module that uses boto3."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto
from botocore.config import Config

from genmodels.errors import Conflict, KeyNotFound, StorageError, StorageUnavailable
from genmodels.storage import multipart
from genmodels.storage.base import (
    CONDITIONS_NEEDED,
    RESERVED,
    PartialUpload,
    Refused,
    Storage,
    appears_whole,
    check_key,
    check_prefix,
    check_size,
)
from genmodels.storage.disk import outage_of_disk
from genmodels.storage.retry import PassingFailure, retry_passing

CONNECT_TIMEOUT, READ_TIMEOUT = 5.0, 30.0  # seconds for one try; boto makes AWS_MAX_ATTEMPTS tries (default 3)
# Codes of answers with status 400 about access. Any other answer with status 400 means that the request is wrong.
_ACCESS = re.compile(
    "Token|Authorization|Expired|Signature|AccessKey|Credential|Skew|Denied|Security|Account|Suspended"
)
_DENIED = "the storage refuses access"
_OF_A_KEY = re.compile(b"<Code>NoSuch(Key|Version|Bucket|Upload)</Code>")  # what S3 says with a status 404
_TAGGED = ("GetObject", "PutObject", "UploadPart")  # operations whose answer has an ETag
_CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL in the environment"

logger = logging.getLogger("genmodels.storage")


class S3Storage(Storage):
    """Store objects in a bucket, under a prefix. The client is made once, on first use, and shared by threads."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.url = f"s3://{bucket}/{prefix}".removesuffix("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._made: Any = None
        self._making = threading.Lock()

    def get(self, key: str) -> tuple[bytes, str]:
        return self._get(key)

    def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        try:
            answer = self._get(key, **({"IfNoneMatch": etag} if etag else {}))
        except _NotModified:
            return None
        return None if answer[1] == etag else answer  # from a store that does not know the condition

    def get_range(self, key: str, start: int, size: int) -> bytes:
        name = self._name(key)

        @retry_passing
        def fetch() -> bytes:
            with self._errors("get", key):
                try:
                    answer = self._client.get_object(
                        Bucket=self._bucket, Key=name, Range=f"bytes={start}-{start + size - 1}"
                    )
                except boto.ClientError as error:
                    if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # the object ends before `start`
                        return b""
                    raise
                with closing(answer["Body"]) as body:
                    data: bytes = body.read()
                whole = "ContentRange" not in answer  # from a store that does not know ranges
                return data[start : start + size] if whole else data

        return fetch()

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        name = self._name(key)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        if if_match is not None:
            condition["IfMatch"] = if_match

        @retry_passing  # 409: another conditional put was in progress
        def store() -> str:
            with self._errors("put", key):
                answer = self._client.put_object(Bucket=self._bucket, Key=name, Body=data, **condition)
                return str(answer["ETag"])

        try:
            return store()
        except KeyNotFound:  # the answer of S3 if no object exists; SeaweedFS answers 412
            raise Conflict(f"{self.url}/{key}: is gone") from None

    def folders(self, prefix: str) -> list[str]:
        with self._errors("folders", prefix):
            pages = self._pages(prefix, Delimiter="/")
            names = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(Path(name).name for name in names if name != f"{self._prefix}{RESERVED}/")

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[str]:
        options: dict[str, Any] = {"StartAfter": self._prefix + after} if after else {}
        if limit is not None:
            options["MaxKeys"] = min(limit, 1000)
        with self._errors("list", prefix):
            objects = islice(self._objects(prefix, **options), limit)
            return sorted(key for key, _ in objects if key > after)

    def sizes(self, prefix: str) -> dict[str, int]:
        with self._errors("sizes", prefix):
            return dict(sorted(self._objects(prefix)))

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def exists(self, key: str) -> bool:
        # Not HEAD: its answer has no body, so a missing bucket, or the 404 of another server, would look like a missing
        # object. Not a listing: it costs twelve times as much.
        try:
            self.get_range(key, 0, 1)
        except KeyNotFound:
            return False
        return True

    def upload(self, path: Path, key: str) -> None:
        name = self._name(key)

        @retry_passing  # the end of a multipart upload whose answer was lost: see `_answer_error`
        def send() -> None:
            with open(path, "rb") as source, self._errors("upload", key):
                self._client.upload_fileobj(source, self._bucket, name)

        send()

    def upload_memory(self, key: str, data: memoryview) -> None:
        target = {"Bucket": self._bucket, "Key": self._name(key)}
        errors = partial(self._errors, "upload", key)

        @retry_passing
        def send() -> None:
            if len(data) > multipart.PART_BYTES:
                multipart.upload(self._client, target, data, errors)
                return
            with errors():
                self._client.put_object(**target, Body=multipart.Body(data))

        send()

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        name, wanted = self._name(key), f"bytes={start}-{start + len(target) - 1}"

        @retry_passing
        def fetch() -> int:
            with self._errors("get", key):
                try:
                    answer = self._client.get_object(Bucket=self._bucket, Key=name, Range=wanted)
                except boto.ClientError as error:
                    if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # the object ends before `start`
                        return 0
                    raise
                at = 0 if "ContentRange" in answer else -start  # a store that does not know ranges sends the whole
                with closing(answer["Body"]) as body:
                    for chunk in body.iter_chunks(1 << 20):
                        part = memoryview(chunk)[max(0, -at) : max(0, len(target) - at)]
                        target[max(0, at) : max(0, at) + len(part)] = part
                        at += len(chunk)
                return max(0, min(at, len(target)))

        return fetch()

    def download(self, key: str, path: Path) -> None:
        name = self._name(key)

        # One stream, not download_file of boto, which checks no checksum, reports a missing bucket as a missing
        # object, and leaves connections open if it fails.
        @retry_passing
        def fetch() -> None:
            with (
                self._errors("download", key),
                appears_whole(path) as temporary,
                open(temporary, "xb") as file,
                closing(self._client.get_object(Bucket=self._bucket, Key=name)["Body"]) as body,
            ):
                for chunk in body.iter_chunks(1 << 20):
                    file.write(chunk)

        fetch()

    def partial_uploads(self, seconds: float) -> Sequence[PartialUpload]:
        before = time.time() - seconds
        try:
            with self._errors("list uploads", ""):
                pages = self._client.get_paginator("list_multipart_uploads")
                pages = pages.paginate(Bucket=self._bucket, Prefix=self._prefix)
                uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        except StorageUnavailable:
            raise
        except StorageError as error:  # e.g. this process may not list them; the store itself may remove old parts
            logger.info("uploads that have not ended are not listed: %s", error)
            return []
        old = [upload for upload in uploads if upload["Initiated"].timestamp() < before]
        return [self._partial_upload(upload) for upload in old]

    def abort_upload(self, upload: PartialUpload) -> None:
        name = self._name(upload.key)
        with suppress(PassingFailure), self._errors("abort upload", upload.key):  # PassingFailure: it has ended
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload.id)

    def clock(self) -> float | None:
        with self._errors("clock", ""):
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else None

    def _get(self, key: str, **condition: str) -> tuple[bytes, str]:
        name = self._name(key)

        @retry_passing  # boto itself does not retry if an answer breaks off
        def fetch() -> tuple[bytes, str]:
            with self._errors("get", key):
                answer = self._client.get_object(Bucket=self._bucket, Key=name, **condition)
                with closing(answer["Body"]) as body:
                    check_size(key, answer["ContentLength"], answer["ETag"])
                    return body.read(), answer["ETag"]

        return fetch()

    def _partial_upload(self, upload: dict[str, Any]) -> PartialUpload:
        size, target = 0, {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        with suppress(PassingFailure), self._errors("list parts", upload["Key"]):  # PassingFailure: it has ended
            pages = self._client.get_paginator("list_parts").paginate(**target)
            size = sum(part["Size"] for page in pages for part in page.get("Parts", ()))
        return PartialUpload(upload["Key"].removeprefix(self._prefix), upload["UploadId"], size)

    def _objects(self, prefix: str, **options: Any) -> Iterator[tuple[str, int]]:
        """Yield keys and sizes, in the order of the store."""
        for page in self._pages(prefix, **options):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                if not key.endswith("/") and not key.startswith(f"{RESERVED}/"):  # not a folder marker of another tool
                    yield key, item["Size"]

    def _pages(self, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        name = self._prefix + check_prefix(prefix)
        yield from self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=name, **options)

    @property
    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = _make_client()
            return self._made

    def _name(self, key: str) -> str:
        name = self._prefix + check_key(key)
        if len(name.encode()) > 1024:
            raise StorageError(f"key {key[:40]!r}...: at most 1024 bytes together with the storage's prefix")
        return name

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """Convert errors of boto; `from None`, since errors of boto may quote headers of a signed request."""
        where = f"{self.url}/{key}: {action}"
        try:
            yield
        except boto.ClientError as error:
            status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"].get("Code", "")
            raise _answer_error(where, status, code) from None
        except (_OtherServerError, RecursionError) as error:  # RecursionError: boto follows redirects without end
            what = f"{where}: a server that is not an S3 store answers ({str(error)[:100]}); check AWS_ENDPOINT_URL"
            raise Refused(what, "another server answers at the address of the storage") from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            raise Refused(f"{where}: no credentials; {_CREDENTIALS}", _DENIED) from None
        except (boto.ResponseStreamingError, boto.IncompleteReadError, boto.FlexibleChecksumError) as error:
            raise PassingFailure(f"{where}: the answer broke off ({type(error).__name__})") from None
        except boto.HTTPClientError as error:
            if isinstance(error.kwargs.get("error"), ValueError):  # a header that cannot be sent
                raise Refused(
                    f"{where}: the credentials have a line break or a space; {_CREDENTIALS}", _DENIED
                ) from None
            raise StorageUnavailable(f"{where}: {self._no_answer(error)}") from None
        except (boto.ConnectionError, boto.CredentialRetrievalError) as error:
            raise StorageUnavailable(f"{where}: {self._no_answer(error)}") from None
        except boto.BotoCoreError as error:
            message = f"{where}: {type(error).__name__}; check the AWS_ variables of the environment"
            raise Refused(message, _DENIED) from None
        except OSError as error:  # of the local file
            raise outage_of_disk(error) or StorageError(f"{where}: {error}") from error

    def _no_answer(self, error: Exception) -> str:
        host = urlsplit(self._client.meta.endpoint_url).netloc.rpartition("@")[2]
        return f"no answer from {host} ({type(error).__name__})"


def _answer_error(where: str, status: int, code: str) -> StorageError:
    """Return the error that an S3 error answer means."""
    if code == "NoSuchBucket":
        message = f"{where}: the bucket does not exist; create it or correct the storage URL"
        return Refused(message, "the bucket of the storage is gone")
    if code == "NoSuchUpload":  # boto repeats the end of a multipart upload, which then no longer exists
        return PassingFailure(f"{where}: the upload is gone")
    if status == 404:
        return KeyNotFound(f"{where}: no such object")
    if status == 304:
        return _NotModified(f"{where}: the object has not changed")
    if status == 412:
        return Conflict(f"{where}: the object exists already, or has changed since it was read")
    if status == 409:
        return PassingFailure(f"{where}: another process writes this object ({status} {code})")
    if status == 501:
        return StorageError(f"{where}: this store does not implement it ({status} {code}); {CONDITIONS_NEEDED}")
    if status == 507 or "StorageFull" in code or "Quota" in code:
        return StorageUnavailable(f"{where}: the store is full ({status} {code})", "the storage is full")
    if status >= 500 or status == 429 or code == "RequestTimeout":
        return StorageUnavailable(f"{where}: the store failed ({status} {code})")
    if status in (401, 403) or _ACCESS.search(code):
        return Refused(f"{where}: not allowed ({status} {code}); {_CREDENTIALS}", _DENIED)
    if status in (400, 405, 411, 413, 414):  # the request is wrong; a retry does not help
        return StorageError(f"{where}: refused ({status} {code})")
    return Refused(f"{where}: refused ({status} {code}); check AWS_ENDPOINT_URL and AWS_DEFAULT_REGION", _DENIED)


class _NotModified(StorageError):
    """Report that an object still has the etag of a conditional read."""


class _OtherServerError(Exception):
    """An answer does not come from an S3 store."""


def _check_answer(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Refuse the answer of a server that is not S3 (a proxy, a login page, another service), before boto reads it.

    A bare 404 would look like a missing object, and a page of HTML like an empty listing or a stored object: all that
    is stored would seem to be gone, and what is written would be lost.

    Raises:
        _OtherServerError: the answer lacks what every S3 store sends.
    """
    status, body = response_dict["status_code"], response_dict["body"]
    headers = {name.lower() for name in response_dict["headers"]}
    operation = operation_model.name
    if status < 300:
        known = "etag" in headers or operation not in _TAGGED
        if operation == "ListObjectsV2":
            known = b"<ListBucketResult" in body
        if operation in ("CreateMultipartUpload", "CompleteMultipartUpload"):  # the latter reports an error as 200
            known = b"MultipartUploadResult" in body or b"<Error" in body
        if operation in ("ListMultipartUploads", "ListParts"):
            known = f"<{operation}Result".encode() in body
        if operation == "DeleteObject":
            known = not body.strip()
    elif status == 304:  # the answer to a conditional read, which names the content again
        known = "etag" in headers
    elif status == 404:
        known = _OF_A_KEY.search(body) is not None
    elif status in (400, 405, 411, 412, 413, 414):  # final for S3; of the others each is an outage
        known = not body.strip() or b"<Error" in body
    else:  # boto follows a redirect to a bucket's region
        known = status >= 400 or "x-amz-bucket-region" in headers
    if not known:
        if hasattr(body, "close"):  # it was not read: a connection
            body.close()
        raise _OtherServerError(f"status {status}, without the parts of an S3 answer")


def _make_client() -> Any:
    # At a custom endpoint boto addresses buckets by path: such a store rarely has a host name for each bucket.
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"mode": "standard"},
    )
    try:
        client = boto3.session.Session().client("s3", config=config)  # the default session is not thread-safe
    except ValueError:
        raise StorageError(
            "an AWS_ environment variable is wrong: AWS_ENDPOINT_URL must be http://host:port or https://host, "
            "AWS_DEFAULT_REGION a name like us-east-1, AWS_MAX_ATTEMPTS a number"
        ) from None
    client.meta.events.register("before-parse.s3", _check_answer)
    return client
