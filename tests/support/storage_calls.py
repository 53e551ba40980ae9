"""Provide each storage operation as one call, and an S3 storage behind a proxy that fails on command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import Conflict, KeyNotFound
from genmodels.storage import Storage, open_storage
from genmodels.storage.instrumented import MeasuredStorage
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server

Call = Callable[[Storage, Path], Any]


READS: dict[str, Call] = {
    "get": lambda storage, path: storage.get("k"),
    "get if changed": lambda storage, path: storage.get_if_changed("k", '"another"'),
    "get range": lambda storage, path: storage.get_range("k", 0, 10),
    "read into": lambda storage, path: storage.read_into("k", 0, memoryview(bytearray(10))),
    "list": lambda storage, path: storage.list(""),
    "sizes": lambda storage, path: storage.sizes("a/"),
    "folders": lambda storage, path: storage.folders(""),
    "exists": lambda storage, path: storage.exists("k"),
    "download": lambda storage, path: storage.download("k", path.with_name("copy")),
}


WRITES: dict[str, Call] = {
    "put": lambda storage, path: storage.put("k", b"x"),
    "put if absent": lambda storage, path: storage.put("k", b"x", if_absent=True),
    "upload": lambda storage, path: storage.upload(path, "k"),
    "upload memory": lambda storage, path: storage.upload_memory("k", memoryview(b"x")),
    "delete": lambda storage, path: storage.delete("k"),
}


ALL = READS | WRITES


def tried(call: Call, storage: Storage, path: Path) -> Exception | None:
    """Call, and return the error; that a key exists or does not exist is a normal result."""
    try:
        call(storage, path)
    except (KeyNotFound, Conflict):
        return None
    except Exception as error:
        return error
    return None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    return path


@pytest.fixture
def proxy(s3_server: S3Server, s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield proxy


@pytest.fixture
def opened(s3_storage: Storage, proxy: FaultProxy) -> Callable[..., Storage]:
    """Open the same storage again and again, with one client, which takes a while to make."""
    inner: Any = open_storage(s3_storage.url)
    return lambda **options: MeasuredStorage(inner._storage, **options)
