"""Test what a process checks before it uses a storage: conditional puts, format, and that the storage still exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import StorageError, StorageUnavailable
from genmodels.storage import Storage, begin_writing, open_storage, probe_conditional_puts, read_marker
from genmodels.storage.marker import MARKER, mark
from services.jobs import app
from services.local.run import quick_run
from services.local.up import Options, up
from tests.support.cli_runner import Run, run
from tests.support.fault_proxy import FaultProxy
from tests.support.storage_calls import ALL, READS, opened, path, proxy, tried
from tests.support.storages import Wrapped, in_threads
from tests.support.tiny_jobs import job, make_data, model

__all__ = ["opened", "path", "proxy", "run"]


class Careless(Wrapped):
    """Ignore some kinds of conditions, as a careless store does."""

    def __init__(self, *ignored: str) -> None:
        super().__init__()
        self.ignored = ignored

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if_absent = if_absent and "if_absent" not in self.ignored
        return super().put(key, data, if_absent=if_absent, if_match=None if "if_match" in self.ignored else if_match)


# ---- conditional puts


@pytest.mark.parametrize(
    ("ignored", "header"),
    [(["if_absent"], "If-None-Match"), (["if_match"], "If-Match"), (["if_absent", "if_match"], "If-None-Match")],
)
def test_a_store_that_ignores_conditions_is_refused(ignored: list[str], header: str) -> None:
    storage = Careless(*ignored)
    for begin in (probe_conditional_puts, begin_writing):
        with pytest.raises(StorageError, match=f"ignores {header}: .*use a store that supports them") as caught:
            begin(storage)
        assert not isinstance(caught.value, StorageUnavailable)
        assert "\n" not in str(caught.value)
    assert storage.list("") == []


def test_a_store_that_honours_them_is_probed_by_many_at_once_and_nothing_is_left(storage: Storage) -> None:
    storage.put("k", b"1")
    markers = in_threads(8, lambda _: begin_writing(open_storage(storage.url)))
    assert markers == [read_marker(storage)] * 8
    assert storage.list("") == ["k"]
    assert storage.folders("") == []
    inner: Any = storage
    if storage.url.startswith("s3:"):
        result = inner._storage._client.list_objects_v2(Bucket=inner._storage._bucket, Prefix=inner._storage._prefix)
        names = [item["Key"].removeprefix(inner._storage._prefix) for item in result["Contents"]]
    else:
        names = [f".storage/{file.name}" for file in (inner._storage._root / ".storage").iterdir()] + ["k"]
        names.remove(".storage/lock")
    assert sorted(names) == [MARKER, "k"]


def test_what_a_start_costs_and_that_nothing_costs_more_later(
    opened: Callable[..., Storage], proxy: FaultProxy
) -> None:
    storage = opened()

    def cost(work: Callable[[], Any]) -> list[str]:
        proxy.requests.clear()
        work()
        return [method for method, _, _ in proxy.requests]

    assert cost(lambda: begin_writing(storage)) == ["PUT", "PUT", "PUT", "DELETE", "GET", "PUT", "GET"]
    assert cost(lambda: begin_writing(opened())) == ["PUT", "PUT", "PUT", "DELETE", "GET"]
    assert cost(lambda: read_marker(opened())) == ["GET"]
    assert cost(lambda: storage.put("k", b"x")) == ["PUT"]
    assert cost(lambda: storage.get("k")) == ["GET"]
    for key in ("k", "no"):
        assert cost(lambda key=key: storage.exists(key)) == ["GET"]
        assert proxy.requests[0][1].partition("?")[0].endswith(f"/{key}"), "a read, not a listing of the bucket"
    assert cost(lambda: storage.list("")) == ["GET"]
    assert cost(lambda: storage.delete("k")) == ["DELETE"]


@pytest.mark.parametrize("mode", ["200", "501 NotImplemented"])
def test_s3_without_conditional_puts_is_refused(opened: Callable[..., Storage], proxy: FaultProxy, mode: str) -> None:
    proxy.fail(mode, method="PUT")
    with pytest.raises(StorageError, match=r"needs conditional puts .*: use a store that supports them") as caught:
        begin_writing(opened(in_use=True))
    assert not isinstance(caught.value, StorageUnavailable)


def test_a_probe_whose_answers_are_lost_takes_its_own_put_for_its_own(
    s3_storage: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.fail("drop-answer", times=1, method="PUT")
    probe_conditional_puts(open_storage(s3_storage.url))
    assert proxy.count("PUT") == 4


def test_an_outage_is_no_verdict(opened: Callable[..., Storage], proxy: FaultProxy) -> None:
    proxy.fail("503")
    with pytest.raises(StorageUnavailable):
        probe_conditional_puts(opened())


def test_no_process_that_relies_on_them_starts(
    s3_storage: Storage, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.fail("200", method="PUT")
    assert app.main(["--storage", s3_storage.url, "--no-auth", "--port", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {s3_storage.url}: the store ignores If-None-Match")
    storage = open_storage(s3_storage.url)
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        up(storage, Options(auth=False))
    tiny = job("tiny", model(make_data(tmp_path), "minigpt"))
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        quick_run(tiny, [], storage, 8999, True, True, tmp_path)


# ---- a folder that goes away


def gone(root: Path, aside: Path) -> None:
    root.rename(aside)


def emptied(root: Path, aside: Path) -> None:
    """Make a folder look unmounted: only the mount point exists."""
    root.rename(aside)
    root.mkdir()


def replaced(root: Path, aside: Path) -> None:
    root.rename(aside)
    open_storage(root.as_uri()).put("k", b"of another storage")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("first", ["get", "exists", "list", "put", "nothing"])
@pytest.mark.parametrize("goes", [gone, emptied, replaced])
def test_a_folder_that_goes_is_an_outage_and_nothing_is_written_beneath(
    tmp_path: Path, path: Path, goes: Callable[[Path, Path], None], first: str
) -> None:
    root, aside = tmp_path / "storage", tmp_path / "aside"
    open_storage(root.as_uri()).put("k", b"1")
    storage = open_storage(root.as_uri(), in_use=first == "nothing")
    tried(ALL.get(first, lambda *_: None), storage, path)
    if first == "nothing" and goes is replaced:
        return  # this process cannot know which storage it was
    goes(root, aside)
    before = content(tmp_path)
    for name, call in ALL.items():
        error = tried(call, storage, path)
        assert isinstance(error, StorageUnavailable), name
        assert error.reason == "the folder of the storage is gone"
        assert "mount" in str(error)
    assert content(tmp_path) == before
    assert root.exists() == (goes is not gone)
    if goes is not gone:
        root.rename(tmp_path / "wrong")
    aside.rename(root)
    assert storage.get("k")[0] in (b"1", b"x")
    storage.put("k", b"2")


def test_a_folder_that_goes_in_the_middle_of_an_operation(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Nothing there" counts only if the folder itself existed."""
    root, aside = tmp_path / "storage", tmp_path / "aside"
    for name, call in READS.items():
        storage: Any = open_storage(root.as_uri())
        storage.put("k", b"1")
        look, looks = storage._storage._look, []

        def goes(look: Callable[[], None] = look, looks: list[int] = looks) -> None:
            look()
            looks.append(1)
            if len(looks) == 1:
                root.rename(aside)

        monkeypatch.setattr(storage._storage, "_look", goes)
        error = tried(call, storage, path)
        assert isinstance(error, StorageUnavailable), name
        aside.rename(root)


def test_writers_of_a_new_folder_agree_on_one_marker(tmp_path: Path) -> None:
    storages = [open_storage((tmp_path / "new").as_uri()) for _ in range(12)]
    assert in_threads(12, lambda i: storages[i].put(f"k{i}", b"x") and None) == [None] * 12
    marker = read_marker(storages[0])
    assert marker is not None
    assert [read_marker(storage) for storage in storages] == [marker] * 12
    assert storages[0].list("") == sorted(f"k{i}" for i in range(12))


def test_content_without_a_marker_gets_one_by_the_first_writer_and_none_by_readers(tmp_path: Path, path: Path) -> None:
    root = tmp_path / "storage"
    root.mkdir()
    (root / "k").write_bytes(b"old")
    storage = open_storage(root.as_uri())
    assert {type(tried(call, storage, path)) for call in READS.values()} == {type(None)}
    assert read_marker(storage) is None
    assert content(root) == {"k": b"old"}
    storage.put("other", b"new")
    assert read_marker(storage) is not None
    assert storage.get("k")[0] == b"old"


def test_one_marker_is_made_by_many(storage: Storage) -> None:
    assert len(set(in_threads(8, lambda _: mark(storage)))) == 1


# ---- formats


@pytest.mark.parametrize(("format", "age"), [(0, "an older"), (1, "an older"), (3, "a newer"), (10**9, "a newer")])
def test_another_format_is_refused_with_one_line(
    storage: Storage, path: Path, tmp_path: Path, format: int, age: str
) -> None:
    storage.put("k", b"1")
    document = json.dumps({"id": "x", "format": format}).encode()
    if storage.url.startswith("file:"):
        (tmp_path / "storage" / MARKER).write_bytes(document)
        calls = list(ALL.values())
    else:
        storage.put(MARKER, document)
        calls = []
    fresh = open_storage(storage.url)
    for call in [*calls, lambda *_: read_marker(fresh), lambda *_: begin_writing(fresh)]:
        error = tried(call, fresh, path)
        assert isinstance(error, StorageError)
        assert not isinstance(error, StorageUnavailable)
        assert f"is written in format {format}, by {age} release of genmodels; this release" in str(error)
        assert str(error).endswith("use that release, or choose another storage with --storage")
        assert "\n" not in str(error)


def test_every_command_refuses_another_format(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENMODELS_API", raising=False)
    open_storage((tmp_path / ".genmodels").as_uri()).put("k", b"1")
    (tmp_path / ".genmodels" / MARKER).write_text('{"id": "x", "format": 1}')
    for words in (["models"], ["keys", "list"], ["keys", "create", "a"], ["data", "list"], ["gc"]):
        code, out, errors = run(*words)
        assert (code, out, len(errors)) == (1, "", 1)
        assert "is written in format 1, by an older release" in errors[0]


DAMAGED_MARKERS = (
    *(b"", b"{", b"[]", b'{"id": "x"}', b'{"format": 1}', b'{"id": 1, "format": "a"}', b"\xff", b"[" * 200_000),
    *(b'{"id": "x", "format": true}', b'{"id": "x", "format": 1e999}', b'{"id": "x", "format": ' + b"9" * 5000 + b"}"),
)


@pytest.mark.parametrize("damage", DAMAGED_MARKERS)
def test_a_damaged_marker_is_told(file_storage: Storage, tmp_path: Path, damage: bytes) -> None:
    file_storage.put("k", b"1")
    (tmp_path / "storage" / MARKER).write_bytes(damage)
    with pytest.raises(StorageError, match=r"marker\.json: is damaged; remove it"):
        open_storage(file_storage.url).get("k")
