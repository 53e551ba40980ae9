"""Test S3 faults through a proxy before the real server: lost responses, servers down or killed, wrong credentials."""

from __future__ import annotations

import random
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from genmodels.errors import Conflict, StorageError, StorageUnavailable
from genmodels.storage import Storage, multipart, open_storage, read_document, s3, write_document
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server


@pytest.fixture
def proxy(s3_server: S3Server, s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        yield proxy


@pytest.fixture
def faulty(proxy: FaultProxy, s3_storage: Storage) -> Storage:
    """Return a storage like `s3_storage`, behind `proxy`; boto makes two attempts."""
    return open_storage(s3_storage.url)


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


# ---- conditional reads


@pytest.mark.parametrize("ignored", [False, True])
def test_a_conditional_read_sends_a_body_only_if_the_object_changed(s3_storage: Storage, ignored: bool) -> None:
    """Some stores ignore the condition, and send the object: the result is the same, with more bytes."""
    inner: Any = s3_storage
    statuses: list[int] = []

    def without_condition(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    events = inner._storage._client.meta.events
    events.register("after-call.s3.GetObject", lambda http_response, **_: statuses.append(http_response.status_code))
    if ignored:
        events.register("before-call.s3.GetObject", without_condition)
    etag = s3_storage.put("k", b"one")
    assert s3_storage.get_if_changed("k", None) == (b"one", etag)
    assert s3_storage.get_if_changed("k", etag) is None
    second = s3_storage.put("k", b"two")
    assert s3_storage.get_if_changed("k", etag) == (b"two", second)
    assert statuses == [200, 200 if ignored else 304, 200]


# ---- the answer was lost


def test_lost_answer_is_a_conflict_with_oneself(faulty: Storage, proxy: FaultProxy) -> None:
    proxy.fail("drop-answer", times=1, method="PUT")
    with pytest.raises(Conflict):  # a plain put cannot know that the object is its own
        faulty.put("plain", b"mine", if_absent=True)
    assert faulty.get("plain")[0] == b"mine"


def test_own_document_is_recognised_when_boto_tries_again(faulty: Storage, proxy: FaultProxy) -> None:
    proxy.fail("drop-answer", times=1, method="PUT")
    etag = write_document(faulty, "doc", {"n": 1}, if_absent=True)
    assert read_document(faulty, "doc") == ({"n": 1}, etag)
    proxy.fail("drop-answer", times=1, method="PUT")
    second = write_document(faulty, "doc", {"n": 2}, if_match=etag)
    assert read_document(faulty, "doc") == ({"n": 2}, second)
    assert proxy.count("PUT") == 4
    assert proxy.count("PUT", "drop-answer") == 2


def test_own_document_is_recognised_when_boto_gives_up(faulty: Storage, proxy: FaultProxy, one_try: None) -> None:
    proxy.fail("drop-answer", times=1, method="PUT")
    etag = write_document(faulty, "doc", {"n": 1}, if_absent=True)
    assert read_document(faulty, "doc") == ({"n": 1}, etag)
    assert proxy.count("PUT") == 1


def test_document_that_never_arrived_is_sent_again(faulty: Storage, proxy: FaultProxy, one_try: None) -> None:
    proxy.fail("503", times=2, method="PUT")
    etag = write_document(faulty, "doc", {"n": 1}, if_absent=True)
    assert read_document(faulty, "doc") == ({"n": 1}, etag)
    assert proxy.count("PUT") == 3


def test_somebody_elses_document_is_a_conflict(
    faulty: Storage, s3_storage: Storage, proxy: FaultProxy, one_try: None
) -> None:
    write_document(s3_storage, "doc", {"n": 1})
    proxy.fail("reset", times=1, method="PUT")
    with pytest.raises(Conflict):
        write_document(faulty, "doc", {"n": 2}, if_absent=True)
    assert read_document(s3_storage, "doc")[0] == {"n": 1}


def test_after_an_outage_a_writer_that_kept_its_nonce_goes_on(
    faulty: Storage, proxy: FaultProxy, one_try: None
) -> None:
    nonce = uuid.uuid4().hex
    proxy.fail("drop-answer", times=1, method="PUT")
    proxy.fail("503")
    with pytest.raises(StorageUnavailable, match="503"):
        write_document(faulty, "doc", {"n": 1}, if_absent=True, nonce=nonce)
    proxy.heal()
    etag = write_document(faulty, "doc", {"n": 1}, if_absent=True, nonce=nonce)
    assert read_document(faulty, "doc") == ({"n": 1}, etag)
    with pytest.raises(Conflict):
        write_document(faulty, "doc", {"n": 1}, if_absent=True)


def test_counter_is_exact_under_faults(faulty: Storage, s3_storage: Storage, proxy: FaultProxy, one_try: None) -> None:
    """There is one writer, so each write is either its own or absent."""
    etag = write_document(s3_storage, "counter", {"count": 0})
    for i in range(12):
        proxy.fail(random.Random(i).choice(["drop-answer", "503", "reset", "ok"]), times=1, method="PUT")
        etag = write_document(faulty, "counter", {"count": i + 1}, if_match=etag)
    assert read_document(s3_storage, "counter") == ({"count": 12}, etag)
    assert proxy.count("PUT") > 12


# ---- the server fails for a moment, or for longer


@pytest.mark.parametrize("mode", ["500", "503", "reset", "drop-answer", "cut-answer", "slow"])
def test_one_failure_is_survived(faulty: Storage, s3_storage: Storage, proxy: FaultProxy, mode: str) -> None:
    s3_storage.put("k", b"x" * 1000)
    proxy.fail(mode, times=1)
    assert faulty.get("k")[0] == b"x" * 1000
    assert proxy.count("GET", mode) == 1
    proxy.fail(mode, times=1)
    faulty.put("k", b"new")
    assert s3_storage.get("k")[0] == b"new"


def test_others_writing_is_waited_for(faulty: Storage, proxy: FaultProxy) -> None:
    proxy.fail("409", times=3, method="PUT")
    faulty.put("k", b"x", if_absent=True)
    assert proxy.count("PUT") == 4


@pytest.mark.parametrize("mode", ["500", "503", "reset", "drop-answer", "hang", "refused"])
def test_outage(
    faulty: Storage, proxy: FaultProxy, one_try: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT", 0.2)
    if mode == "refused":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    else:
        proxy.fail(mode)
    path = tmp_path / "file"
    path.write_bytes(b"untouched")
    calls: list[Callable[[], Any]] = [
        lambda: faulty.get("k"),
        lambda: faulty.put("k", b"x"),
        lambda: faulty.list(""),
        lambda: faulty.exists("k"),
        lambda: faulty.delete("k"),
        lambda: faulty.upload(path, "k"),
        lambda: faulty.upload_memory("k", memoryview(b"x")),
        lambda: faulty.read_into("k", 0, memoryview(bytearray(1))),
        lambda: faulty.download("k", path),
        lambda: write_document(faulty, "k", {}, if_absent=True),
    ]
    for call in calls:
        with pytest.raises(StorageUnavailable, match=r"/k: |/: "):
            call()
    assert path.read_bytes() == b"untouched"
    assert list(tmp_path.iterdir()) == [path]


# ---- large files


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "20MB"
    path.write_bytes(random.Random(0).randbytes(20_000_000))
    return path


def test_upload_survives_lost_answers(faulty: Storage, s3_storage: Storage, proxy: FaultProxy, large: Path) -> None:
    proxy.fail("drop-answer", times=1, method="PUT", path="partNumber=2")
    proxy.fail("drop-answer", times=1, method="POST", path="uploadId=")  # the end: the server has forgotten the upload
    faulty.upload(large, "large")
    assert proxy.count("PUT", "drop-answer") == proxy.count("POST", "drop-answer") == 1
    assert s3_storage.get("large")[0] == large.read_bytes()
    proxy.fail("404 NoSuchUpload", times=1, method="POST", path="uploadId=")  # how some stores answer the second end
    faulty.upload(large, "again")
    assert s3_storage.get("again")[0] == large.read_bytes()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", 5 * 2**20)  # the least that S3 allows


def test_an_upload_from_memory_survives_lost_answers(
    faulty: Storage, s3_storage: Storage, proxy: FaultProxy, large: Path, small_parts: None
) -> None:
    data = large.read_bytes()
    proxy.fail("drop-answer", times=1, method="PUT", path="partNumber=2")
    faulty.upload_memory("large", memoryview(data))
    assert proxy.count("PUT", "drop-answer") == 1
    assert proxy.count("PUT") == 5  # only the lost part is sent again
    proxy.fail("drop-answer", times=1, method="POST", path="uploadId=")
    faulty.upload_memory("lost end", memoryview(data))
    proxy.fail("404 NoSuchUpload", times=1, method="POST", path="uploadId=")
    faulty.upload_memory("again", memoryview(data))
    for key in ("large", "lost end", "again"):
        assert s3_storage.get(key)[0] == data, key


def test_a_failed_upload_from_memory_leaves_no_parts(
    faulty: Storage, s3_storage: Storage, proxy: FaultProxy, large: Path, small_parts: None, one_try: None
) -> None:
    s3_storage.put("large", b"before")
    proxy.fail("503", method="PUT", path="partNumber=3")
    with pytest.raises(StorageUnavailable, match="large: upload: the store failed"):
        faulty.upload_memory("large", memoryview(large.read_bytes()))
    assert s3_storage.get("large")[0] == b"before"
    inner: Any = s3_storage
    client, bucket = inner._storage._client, inner._storage._bucket
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_parts_that_could_not_be_removed_are_removed_later(
    faulty: Storage, s3_storage: Storage, proxy: FaultProxy, large: Path, small_parts: None, one_try: None
) -> None:
    proxy.fail("503", method="PUT", path="partNumber=3")
    proxy.fail("503", method="DELETE")
    with pytest.raises(StorageUnavailable):
        faulty.upload_memory("runs/j/m/large", memoryview(large.read_bytes()))
    proxy.heal()
    assert s3_storage.partial_uploads(3600.0) == [], "it may be in progress"
    (upload,) = s3_storage.partial_uploads(-1.0)
    assert upload.key == "runs/j/m/large"
    assert upload.bytes >= 5 * 2**20
    for _ in range(2):  # the second time it is gone
        s3_storage.abort_upload(upload)
        assert s3_storage.partial_uploads(-1.0) == []


@pytest.mark.parametrize("answer", ["403 AccessDenied", "501 NotImplemented"])
def test_a_store_that_does_not_list_uploads_has_none(faulty: Storage, proxy: FaultProxy, answer: str) -> None:
    faulty.list("")
    proxy.fail(answer, method="GET", path="uploads")
    assert faulty.partial_uploads(0.0) == []
    assert proxy.count("GET", answer) == 1


def test_reading_into_memory_survives_broken_answers(faulty: Storage, s3_storage: Storage, proxy: FaultProxy) -> None:
    data = random.Random(0).randbytes(3_000_000)
    s3_storage.put("k", data)
    target = bytearray(2_000_000)
    proxy.fail("cut-answer", times=2, method="GET")
    assert faulty.read_into("k", 500_000, memoryview(target)) == len(target)
    assert target == data[500_000:2_500_000]


def test_download_is_whole_or_absent(
    faulty: Storage, s3_storage: Storage, proxy: FaultProxy, large: Path, tmp_path: Path
) -> None:
    s3_storage.upload(large, "large")
    s3_storage.put("small", b"x" * 100_000)
    target = tmp_path / "copy"
    proxy.fail("cut-answer", method="GET")
    with pytest.raises(StorageUnavailable, match="small: download: the answer broke off"):
        faulty.download("small", target)
    assert list(tmp_path.iterdir()) == []
    proxy.heal()
    proxy.fail("cut-answer", times=2, method="GET")
    faulty.download("large", target)
    assert target.read_bytes() == large.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_killed_server_keeps_what_it_acknowledged(s3_server: S3Server, s3_storage: Storage, one_try: None) -> None:
    document = write_document(s3_storage, "doc", {"n": 1}, if_absent=True)
    plain = s3_storage.put("plain", b"x" * 100_000)
    s3_server.kill()
    try:
        with pytest.raises(StorageUnavailable):
            s3_storage.get("plain")
    finally:
        s3_server.start()
    assert s3_storage.get("plain") == (b"x" * 100_000, plain)
    assert read_document(s3_storage, "doc") == ({"n": 1}, document)
    write_document(s3_storage, "doc", {"n": 2}, if_match=document)


# ---- wrong settings


def every_call(storage: Storage, path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: storage.get("k"),
        lambda: storage.put("k", b"x"),
        lambda: storage.put("k", b"x", if_absent=True),
        lambda: storage.list(""),
        lambda: storage.exists("k"),
        lambda: storage.delete("k"),
        lambda: storage.upload(path, "k"),
        lambda: storage.upload_memory("k", memoryview(b"x")),
        lambda: storage.read_into("k", 0, memoryview(bytearray(1))),
        lambda: storage.download("k", path),
        lambda: write_document(storage, "k", {}),
    ]


WRONG: dict[str, dict[str, str | None]] = {
    "another secret": {"AWS_SECRET_ACCESS_KEY": "canary-secret"},
    "another key": {"AWS_ACCESS_KEY_ID": "canary-key"},
    "line break": {"AWS_ACCESS_KEY_ID": "canary-key\n"},
    "token with line break": {"AWS_SESSION_TOKEN": "canary-token\n"},
    "no secret": {"AWS_SECRET_ACCESS_KEY": None},
    "none": {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_credentials(
    s3_storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, one_try: None
) -> None:
    for name, value in WRONG[fault].items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for call in every_call(open_storage(s3_storage.url), path):
        with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
            call()
        assert not isinstance(caught.value, StorageUnavailable)
        shown = "".join(traceback.format_exception(caught.value))
        assert "canary" not in shown
        assert S3Server.secret_key not in shown
        assert S3Server.access_key not in shown
    assert path.read_bytes() == b"x"


def test_missing_bucket(s3_storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for call in every_call(open_storage("s3://no-such-bucket/x"), path):
        with pytest.raises(
            StorageError, match=r"s3://no-such-bucket/x/.*the bucket does not exist; create it"
        ) as caught:
            call()
        assert not isinstance(caught.value, StorageUnavailable)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:8333"),
        ("AWS_DEFAULT_REGION", "us east"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_PROFILE", "none"),
    ],
)
def test_wrong_environment(s3_storage: Storage, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="AWS_"):
        open_storage(s3_storage.url).list("")


def test_buckets_are_paths_of_an_endpoint_of_ones_own(s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def address() -> str:
        client = open_storage("s3://bucket/x")._storage._client  # type: ignore[attr-defined]
        return str(client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "x/k"}))

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
        monkeypatch.setenv(name, "http://store.test:9000")
        assert address().startswith("http://store.test:9000/bucket/x/k?")
        monkeypatch.delenv(name)
    assert address().startswith("https://bucket.s3.")


def test_client_is_made_once(s3_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = boto3.session.Session.client

    def count(session: Any, *args: Any, **settings: Any) -> Any:
        made.append(args[0])
        time.sleep(0.05)
        return make(session, *args, **settings)

    monkeypatch.setattr(boto3.session.Session, "client", count)
    storage = open_storage(s3_storage.url)
    assert made == []
    barrier = threading.Barrier(8)

    def use(i: int) -> None:
        barrier.wait()
        storage.put(f"k/{i}", b"x")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert made == ["s3"]
    assert len(storage.list("k/")) == 8
