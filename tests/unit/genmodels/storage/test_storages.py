"""Test both storages with one suite: S3 behaves as a local folder does."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import Conflict, DamagedObject, KeyNotFound, StorageError, StorageUnavailable
from genmodels.storage import (
    Storage,
    decode_floats,
    encode_floats,
    multipart,
    open_storage,
    read_document,
    write_document,
)
from genmodels.storage import base as base_module
from genmodels.storage import folder as folder_module


def in_threads(n: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of work(0), ..., work(n - 1), all started at the same moment."""
    barrier = threading.Barrier(n)

    def start(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


# ---- keys and bytes


def test_round_trip(storage: Storage) -> None:
    for key, data in {
        "a": b"1",
        "runs/job/model/start.json": b"\x00\xff" * 999,
        "empty": b"",
        "ü/sp ace/+%20&=": b"x",
    }.items():
        assert not storage.exists(key)
        etag = storage.put(key, data)
        assert storage.get(key) == (data, etag)
        assert storage.exists(key)


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, 12 * 2**20 + 3])
def test_memory_is_uploaded_and_read_back(storage: Storage, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", 5 * 2**20)
    data = random.Random(size).randbytes(size)
    storage.upload_memory("a/b", memoryview(data))
    assert storage.get("a/b")[0] == data
    for start, length in ((0, size), (size // 2, size), (size, 10), (size + 10, 10)):
        target = bytearray(length)
        count = storage.read_into("a/b", start, memoryview(target))
        assert count == max(0, min(length, size - start))
        assert target[:count] == data[start : start + count]
    with pytest.raises(KeyNotFound):
        storage.read_into("a/c", 0, memoryview(bytearray(1)))


def test_overwriting_changes_the_etag(storage: Storage) -> None:
    first = storage.put("k", b"one")
    second = storage.put("k", b"two")
    assert first != second
    assert storage.get("k") == (b"two", second)


def test_an_unchanged_object_is_not_sent_again(storage: Storage) -> None:
    etag = storage.put("k", b"one")
    assert storage.get_if_changed("k", None) == (b"one", etag)
    assert storage.get_if_changed("k", etag) is None
    second = storage.put("k", b"two")
    assert storage.get_if_changed("k", etag) == (b"two", second)
    storage.delete("k")
    for known in (None, etag):
        with pytest.raises(KeyNotFound):
            storage.get_if_changed("k", known)


def test_what_is_missing(storage: Storage, tmp_path: Path) -> None:
    storage.put("folder/key", b"")
    for key in ("nothing", "folder", "folder/other", "folder/key/below"):
        assert not storage.exists(key)
        with pytest.raises(KeyNotFound, match=key):
            storage.get(key)
        with pytest.raises(KeyNotFound, match=key):
            storage.download(key, tmp_path / "target")
        storage.delete(key)
    assert not list(tmp_path.glob("*target*"))
    assert storage.exists("folder/key")


def test_delete(storage: Storage) -> None:
    for key in ("a/b/1", "a/b/2"):
        storage.put(key, b"x")
    storage.delete("a/b/1")
    assert storage.list("") == ["a/b/2"]
    storage.delete("a/b/2")
    storage.delete("a/b/2")
    assert storage.list("") == []
    storage.put("a/b", b"now an object")  # the folder of that name is gone
    assert storage.get("a/b")[0] == b"now an object"


def test_list(storage: Storage) -> None:
    keys = ["a", "b-c/x", "b.c/x", "b/10", "b/2", "b/sub/deep/x", "b/ä", "b0", "bc", "é"]
    for key in random.Random(0).sample(keys, len(keys)):
        storage.put(key, b"x")
    assert storage.list("") == keys
    assert storage.list("b/") == ["b/10", "b/2", "b/sub/deep/x", "b/ä"]
    assert storage.list("b") == keys[1:-1]
    assert storage.list("b/s") == storage.list("b/sub/deep/") == ["b/sub/deep/x"]
    assert storage.list("z/") == storage.list("a/") == storage.list("b/z/y") == []


def test_list_a_part(storage: Storage) -> None:
    keys = [f"ended/{i:04}-x" for i in range(0, 60, 2)]
    for key in [*keys, "ended-not/1", "a", "z"]:
        storage.put(key, b"x")
    assert storage.list("ended/", limit=7) == keys[:7]
    assert storage.list("ended/", after=keys[6], limit=7) == keys[7:14]
    assert storage.list("ended/", after="ended/0013-") == keys[7:]  # the key does not exist
    assert storage.list("ended/", after="ended/", limit=1) == storage.list("ended/", after="a", limit=1) == keys[:1]
    assert storage.list("ended/", after=keys[-1]) == storage.list("ended/", after="z") == []
    assert storage.list("ended/", limit=0) == []
    assert storage.list("ended/", limit=1000) == keys


def test_folders(storage: Storage) -> None:
    for key in ("a", "b-c/x", "b/10", "b/2", "b/sub/deep/x", "b/sub/x", "b0", "bc/y"):
        storage.put(key, b"x")
    assert storage.folders("") == ["b", "b-c", "bc"]
    assert storage.folders("b") == ["b", "b-c", "bc"]
    assert storage.folders("bc") == ["bc"]
    assert storage.folders("b/") == storage.folders("b/s") == ["sub"]
    assert storage.folders("b/sub/") == ["deep"]
    assert storage.folders("a/") == storage.folders("z/y") == storage.folders("b/1") == []


def test_a_part_takes_no_more_than_it_needs(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        file_storage.put(f"models/m{i:02}/versions/1", b"x")
    opened: list[str] = []
    scandir = os.scandir

    def scan(path: Path) -> Any:
        opened.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert len(file_storage.folders("models/")) == 20
    assert opened == ["models"]
    opened.clear()
    assert file_storage.list("models/", after="models/m17/versions/1", limit=1) == ["models/m18/versions/1"]
    assert opened == ["models", "m17", "versions", "m18", "versions"]


def test_sizes(storage: Storage) -> None:
    for key, size in {"a/b/x": 10, "a/b-c": 0, "a/y": 2000, "b": 1}.items():
        storage.put(key, b"x" * size)
    assert storage.sizes("a/") == {"a/b-c": 0, "a/b/x": 10, "a/y": 2000}
    assert list(storage.sizes("a/b")) == ["a/b-c", "a/b/x"]
    assert storage.sizes("c/") == {}


def test_ranges(storage: Storage) -> None:
    data = bytes(range(100))
    storage.put("k", data)
    storage.put("empty", b"")
    for start, size in [(0, 1), (0, 100), (0, 1000), (37, 20), (99, 1), (99, 10), (100, 5), (1000, 5)]:
        assert storage.get_range("k", start, size) == data[start : start + size]
    assert storage.get_range("empty", 0, 10) == b""
    for key in ("gone", "k/x"):
        with pytest.raises(KeyNotFound):
            storage.get_range(key, 0, 10)


def test_list_of_many_pages(s3_storage: Storage) -> None:
    pages: list[int] = []

    def small_page(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 4
        pages.append(1)

    s3_storage._storage._client.meta.events.register("before-parameter-build.s3.ListObjectsV2", small_page)  # type: ignore[attr-defined]
    keys = sorted(f"d{i % 3}/{i}" for i in range(23))
    for key in keys:
        s3_storage.put(key, b"x")
    assert s3_storage.list("") == keys
    assert len(pages) == 6
    assert s3_storage.folders("") == ["d0", "d1", "d2"]
    pages.clear()
    assert s3_storage.list("d0/", limit=3) == keys[:3]
    assert len(pages) == 1


def test_storage_is_the_same_from_its_url(storage: Storage) -> None:
    storage.put("k", b"1")
    again = open_storage(storage.url)
    assert again.url == storage.url
    assert again.get("k")[0] == b"1"


def test_prefixes_are_apart(s3_storage: Storage) -> None:
    inner = open_storage(f"{s3_storage.url}/inner/")
    assert inner.url == f"{s3_storage.url}/inner"
    inner.put("k", b"1")
    open_storage(f"{s3_storage.url}/inner2").put("k", b"2")
    assert inner.list("") == ["k"]
    assert s3_storage.list("") == ["inner/k", "inner2/k"]


BAD_KEYS = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    "../a",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 256,
    "ä" * 128,
    ".storage/lock",
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys(storage: Storage, tmp_path: Path, key: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    calls: list[Callable[[], Any]] = [
        lambda: storage.get(key),
        lambda: storage.put(key, b""),
        lambda: storage.delete(key),
        lambda: storage.exists(key),
        lambda: storage.upload(path, key),
        lambda: storage.download(key, path),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"key .*(must be names|reserved)"):
            call()
    assert path.read_bytes() == b"x"


def test_bad_prefixes_and_long_keys(s3_storage: Storage, storage: Storage) -> None:
    for prefix in ("../", "/", "a/../", "a//b", ".storage/"):
        with pytest.raises(StorageError):
            storage.list(prefix)
    storage.put("x" * 255 + "/" + "y" * 255, b"long")
    with pytest.raises(StorageError, match="at most 1024 bytes"):
        s3_storage.put("/".join(["z" * 255] * 4), b"")


@pytest.mark.parametrize(
    "url",
    [
        "", "/tmp/x", "file://relative/x", "file:relative", "http://host/x", "S3://bucket", "s3://", "s3:///x", "s3://UPPER/x",
        "s3://b/x", "s3://bucket//x", "s3://bucket/a/../b", "s3://bucket/x?endpoint_override=http://evil", "file:///tmp/x?a=b",
        "s3://bucket/#x", "file:///tmp/%00", "s3://KEY:the-secret@bucket/x", "s3://KEY:the/secret@bucket/x?y", "gs://bucket/x",
    ],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    with pytest.raises(StorageError, match=r"storage URL|key") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)
    assert "evil" not in str(caught.value)
    assert any(
        remedy in str(caught.value)
        for remedy in ("s3://bucket/prefix", "file:///tmp/x", "AWS_ENDPOINT_URL", "must be names")
    )


# ---- conditional puts


def test_conditions(storage: Storage) -> None:
    with pytest.raises(Conflict):
        storage.put("k", b"0", if_match='"00000000000000000000000000000000"')
    assert not storage.exists("k")
    first = storage.put("k", b"1", if_absent=True)
    with pytest.raises(Conflict):
        storage.put("k", b"2", if_absent=True)
    second = storage.put("k", b"2", if_match=first)
    with pytest.raises(Conflict):
        storage.put("k", b"3", if_match=first)
    assert storage.get("k") == (b"2", second)


def rounds(storage: Storage) -> int:
    return 10 if storage.url.startswith("file:") else 2  # eight contenders take SeaweedFS over a second


def test_one_of_eight_creates(storage: Storage) -> None:
    for turn in range(rounds(storage)):
        key = f"claims/{turn}"

        def claim(i: int, key: str = key) -> bool:
            try:
                storage.put(key, b"%d" % i, if_absent=True)
            except Conflict:
                return False
            return True

        won = in_threads(8, claim)
        assert won.count(True) == 1
        assert storage.get(key)[0] == b"%d" % won.index(True)


def test_one_of_eight_replaces(storage: Storage) -> None:
    etag = write_document(storage, "doc", {"writer": -1})
    for _ in range(rounds(storage)):

        def replace(i: int, etag: str = etag) -> str | None:
            try:
                return write_document(storage, "doc", {"writer": i}, if_match=etag)
            except Conflict:
                return None

        won = in_threads(8, replace)
        [etag] = [won_etag for won_etag in won if won_etag]
        assert read_document(storage, "doc") == ({"writer": won.index(etag)}, etag)


def test_counter_loses_nothing(storage: Storage) -> None:
    write_document(storage, "counter", {"count": 0})

    def count_up(_: int) -> None:
        remaining = 6
        while remaining:
            document, etag = read_document(storage, "counter")
            try:
                write_document(storage, "counter", {"count": document["count"] + 1}, if_match=etag)
                remaining -= 1
            except Conflict:
                pass

    in_threads(4, count_up)
    assert read_document(storage, "counter")[0] == {"count": 24}


CONTENDER = """
import sys
from genmodels.errors import Conflict
from genmodels.storage import open_storage, read_document, write_document

def count_up(times):
    while times:
        document, etag = read_document(storage, "counter")
        try:
            write_document(storage, "counter", {"count": document["count"] + 1}, if_match=etag)
            times -= 1
        except Conflict:
            pass

storage = open_storage(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    if line == "count\\n":
        count_up(10)
        continue
    try:
        storage.put(line.strip(), sys.argv[2].encode(), if_absent=True)
        print("won", flush=True)
    except Conflict:
        print("lost", flush=True)
"""


def test_processes_contend_for_files(file_storage: Storage) -> None:
    write_document(file_storage, "counter", {"count": 0})
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, file_storage.url, str(i)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for i in range(4)
    ]  # fmt: skip

    def tell(line: str) -> None:
        for process in contenders:
            assert process.stdin
            process.stdin.write(line)

    def answers() -> list[str]:
        return [process.stdout.readline().strip() for process in contenders if process.stdout]

    try:
        assert answers() == ["ready"] * 4
        for turn in range(20):
            tell(f"claims/{turn}\n")
            won = answers()
            assert sorted(won) == ["lost", "lost", "lost", "won"]
            assert file_storage.get(f"claims/{turn}")[0] == b"%d" % won.index("won")
        tell("count\n")
        for process in contenders:
            process.communicate(timeout=60)
            assert process.returncode == 0
    finally:
        for process in contenders:
            process.kill()
            process.communicate()
    assert read_document(file_storage, "counter")[0] == {"count": 40}


def test_writers_and_deleters_in_one_folder(storage: Storage) -> None:
    def work(i: int) -> None:
        for turn in range(5):
            storage.put(f"deep/er/{i}", b"%d" % turn)
            assert storage.get(f"deep/er/{i}")[0] == b"%d" % turn
            storage.delete(f"deep/er/{i}")

    in_threads(4, work)
    assert storage.list("") == []


# ---- documents


def test_document_round_trip(storage: Storage) -> None:
    document = {"b": [1, 2.5, None, {"x": True}], "a": "ü", "loss": math.nan, "best": [math.inf, -math.inf]}
    etag = write_document(storage, "doc.json", document)
    stored, result = read_document(storage, "doc.json")
    assert result == etag
    assert stored == {"a": "ü", "b": [1, 2.5, None, {"x": True}], "best": ["inf", "-inf"], "loss": "nan"}
    text = storage.get("doc.json")[0].decode()
    assert list(json.loads(text)) == ["a", "b", "best", "loss", "nonce"]
    assert write_document(storage, "doc.json", document) != etag  # each write has its own nonce


def test_floats_come_back() -> None:
    numbers = {"a": [1, 2.5, math.inf], "b": {"c": -math.inf}, "d": None}
    assert encode_floats(numbers) == {"a": [1, 2.5, "inf"], "b": {"c": "-inf"}, "d": None}
    assert decode_floats(encode_floats(numbers)) == numbers
    assert math.isnan(decode_floats(encode_floats(math.nan)))


def test_document_conflict_leaves_the_winner(storage: Storage) -> None:
    etag = write_document(storage, "doc", {"n": 1}, if_absent=True)
    for condition in ({"if_absent": True}, {"if_match": '"0123"'}):
        with pytest.raises(Conflict):
            write_document(storage, "doc", {"n": 2}, **condition)
    assert read_document(storage, "doc") == ({"n": 1}, etag)


def test_damaged_documents(storage: Storage) -> None:
    for data in (b"", b"{", b"[1]", b"\xff\xfe", b'"text"'):
        storage.put("doc", data)
        with pytest.raises(DamagedObject, match=r"^doc: damaged"):
            read_document(storage, "doc")
        with pytest.raises(Conflict):
            write_document(storage, "doc", {}, if_absent=True)
    with pytest.raises(KeyNotFound):
        read_document(storage, "other")


# ---- large files


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "20MB"
    path.write_bytes(random.Random(0).randbytes(20_000_000))
    return path


def test_large_files(storage: Storage, large: Path, tmp_path: Path) -> None:
    storage.upload(large, "blobs/large")
    assert storage.list("") == ["blobs/large"]
    target = tmp_path / "new" / "folder" / "copy"
    storage.download("blobs/large", target)
    assert target.read_bytes() == large.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["copy"]
    data, etag = storage.get("blobs/large")
    assert data == large.read_bytes()
    if storage.url.startswith("s3:"):
        assert etag.endswith('-3"')  # as many parts
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "none", "k")


# ---- the folder's own


def test_folder_url_with_odd_names(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/a b%20c/ü")
    storage.put("k", b"1")
    assert (tmp_path / "a b c" / "ü" / "k").read_bytes() == b"1"
    assert open_storage(storage.url).get("k")[0] == b"1"


def test_reading_an_absent_folder_makes_nothing(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/none")
    assert storage.list("") == []
    assert not storage.exists("k")
    storage.delete("k")
    assert list(tmp_path.iterdir()) == []


def test_key_cannot_be_object_and_folder(file_storage: Storage) -> None:
    file_storage.put("a/b", b"1")
    for key in ("a", "a/b/c", "a/b/c/d"):
        with pytest.raises(StorageError, match="a key cannot be an object and the folder of others"):
            file_storage.put(key, b"2")
    assert file_storage.list("") == ["a/b"]
    assert file_storage.get("a/b")[0] == b"1"


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dangling", "socket"])
def test_what_is_no_file_is_no_object(kind: str, file_storage: Storage, tmp_path: Path) -> None:
    file_storage.put("a/whole", b"1")
    path = tmp_path / "storage" / "a" / "odd"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            os.mknod(path, stat.S_IFSOCK)
        case _:
            path.symlink_to({"device": "/dev/zero", "loop": "odd", "dangling": "nothing"}[kind])
    with pytest.raises(KeyNotFound):
        file_storage.get("a/odd")
    with pytest.raises(KeyNotFound):
        file_storage.download("a/odd", tmp_path / "copy")
    assert not file_storage.exists("a/odd")
    with pytest.raises(Conflict):
        file_storage.put("a/odd", b"2", if_match="x")
    etag = file_storage.put("a/odd", b"2", if_absent=True)
    assert file_storage.get("a/odd") == (b"2", etag)


def test_what_does_not_fit_into_memory_is_damaged(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "MAX_GET_BYTES", 1000)
    monkeypatch.setattr(folder_module, "MAX_GET_BYTES", 1000)
    storage.put("a", b"x" * 1001)
    with pytest.raises(DamagedObject, match="1,001 bytes") as error:
        read_document(storage, "a")
    with pytest.raises(Conflict):
        storage.put("a", b"{}", if_match="x")
    storage.put("a", b"{}", if_match=error.value.etag)
    assert read_document(storage, "a")[0] == {}


def test_lock_held_for_ever(file_storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file_storage.put("k", b"old")
    monkeypatch.setattr(folder_module, "LOCK_TIMEOUT", 0.1)
    with open(tmp_path / "storage" / ".storage" / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageUnavailable, match="lock"):
            open_storage(file_storage.url).put("k", b"new")
        assert file_storage.get("k")[0] == b"old"
    file_storage.put("k", b"new")


def test_old_temporary_files_are_swept(file_storage: Storage, tmp_path: Path) -> None:
    hidden = tmp_path / "storage" / ".storage"
    hidden.mkdir(parents=True)
    for name, age in {"left.tmp": 2 * 86_400, "busy.tmp": 60, "lock": 2 * 86_400}.items():
        (hidden / name).write_bytes(b"x")
        os.utime(hidden / name, (time.time() - age,) * 2)
    file_storage.put("k", b"1")
    assert sorted(path.name for path in hidden.iterdir()) == ["busy.tmp", "lock", "marker.json"]
    assert file_storage.list("") == ["k"]


OVERWRITER = """
import sys
from genmodels.storage import open_storage
storage = open_storage(sys.argv[1])
while True:
    for byte in (b"a", b"b"):
        storage.put("k", byte * 1_000_000)
        if byte == b"a":
            print("put", flush=True)
"""


def test_killed_writer_leaves_a_whole_object(file_storage: Storage) -> None:
    with subprocess.Popen([sys.executable, "-c", OVERWRITER, file_storage.url], stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        writer.stdout.readline()
        try:
            for _ in range(300):
                assert file_storage.get("k")[0] in (b"a" * 1_000_000, b"b" * 1_000_000)
        finally:
            writer.kill()
    data = file_storage.get("k")[0]
    assert data in (b"a" * 1_000_000, b"b" * 1_000_000)
    assert file_storage.list("") == ["k"]
    file_storage.put("k", b"the lock went with its holder", if_match=file_storage.get("k")[1])
