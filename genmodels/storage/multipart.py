"""Send an object that lies in memory to an S3 store: in parts, in parallel, without copying its bytes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any

from genmodels.errors import StorageError
from genmodels.storage.retry import retry_passing

PART_BYTES = 16 * 2**20
MAX_PARTS = 10_000  # a limit of S3
PARALLEL_PARTS = 4
BLOCK_BYTES = 2**20  # of a read: a call of Python for each holds the interpreter lock, hashing and sending do not

Errors = Callable[[], AbstractContextManager[None]]


class Body:
    """Present memory as a file for boto. Each read returns a view of the memory, of at least `BLOCK_BYTES`.

    An HTTP client asks for 16 KiB at a time, which would take the interpreter lock sixty times as often.
    """

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int | None = -1) -> memoryview:
        end = len(self._data) if size is None or size < 0 else self._at + max(size, BLOCK_BYTES)
        block = self._data[self._at : end]
        self._at += len(block)
        return block

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def upload(client: Any, target: dict[str, str], data: memoryview, errors: Errors) -> None:
    """Store an object; a failed upload leaves no parts if the store still answers.

    Args:
        target: `Bucket` and `Key`.
        errors: makes a context that converts the errors of boto.
    """
    kind = {"ChecksumAlgorithm": "CRC32"} if client.meta.config.request_checksum_calculation == "when_supported" else {}
    with errors():
        begun = target | {"UploadId": client.create_multipart_upload(**target, **kind)["UploadId"]}

    @retry_passing
    def send(first: int) -> dict[str, Any]:
        number, body = first // size + 1, Body(data[first : first + size])
        with errors():
            answer = client.upload_part(**begun, **kind, PartNumber=number, Body=body)
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
        return {"PartNumber": number, "ETag": answer["ETag"]} | checksums

    size = part_bytes(len(data))
    try:
        parts = _in_parallel(send, range(0, len(data), size))
        with errors():
            client.complete_multipart_upload(**begun, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(StorageError), errors():
            client.abort_multipart_upload(**begun)
        raise


def part_bytes(size: int) -> int:
    """Return the size of the parts of an object."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


def _in_parallel(send: Callable[[int], dict[str, Any]], places: range) -> list[dict[str, Any]]:
    """Return the results in order; after an error, begin no further part."""
    with ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="upload") as pool:
        futures = [pool.submit(send, place) for place in places]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
