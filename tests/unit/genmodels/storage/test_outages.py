"""Test that a refusal after a success is a temporary outage: each refusal, at each operation, on S3 and in a folder.

At the start of a command, the same refusal is one clear error.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import StorageError, StorageUnavailable
from genmodels.keys import Keys
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.store import Run
from genmodels.storage import Storage, begin_writing, open_storage
from genmodels.storage.base import Refused
from genmodels.storage.instrumented import MeasuredStorage
from genmodels.storage.lease import Lease
from genmodels.storage.marker import MARKER
from services.dispatch import dispatcher as dispatcher_module
from services.dispatch import single_run
from services.dispatch.backends.local_process import SubprocessBackend
from services.dispatch.dispatcher import Dispatcher
from services.dispatch.single_run import run_to_completion
from services.local.platform import submit as submit_here
from tests.support.asgi_server import served
from tests.support.fault_proxy import FaultProxy
from tests.support.paths import ROOT
from tests.support.scripted_cluster import Cluster, carry_on, check_the_end, data, eventful, in_no_time, state, submit
from tests.support.scripted_drivers import Drivers, succeeds
from tests.support.storage_calls import ALL, READS, WRITES, opened, path, proxy, tried
from tests.support.storages import MemoryStorage, Wrapped
from tests.support.tiny_jobs import job, make_data, model

__all__ = ["opened", "path", "proxy"]

__all__ = ["data", "in_no_time"]

DENIED, FULL, SILENT = "the storage refuses access", "the storage is full", "the storage does not answer"

# ---- S3

REFUSALS = [
    ("401", DENIED),
    ("403 InvalidAccessKeyId", DENIED),
    ("403 RequestTimeTooSkewed", DENIED),
    ("400 ExpiredToken", DENIED),
    ("402 PaymentRequired", DENIED),
    ("404 NoSuchBucket", "the bucket of the storage is gone"),
]
OUTAGES = [
    *REFUSALS,
    ("507 XMinioStorageFull", FULL),
    ("403 QuotaExceeded", FULL),
    ("429 SlowDown", SILENT),
    ("400 AuthorizationHeaderMalformed", DENIED),
]


def test_a_refusal_by_s3_is_final_at_the_start_and_an_outage_later(
    opened: Callable[..., Storage], proxy: FaultProxy, path: Path
) -> None:
    for mode, reason in REFUSALS:
        storage, refused = opened(), proxy.fail(mode)
        assert {type(tried(call, storage, path)) for call in ALL.values()} == {Refused}, mode
        proxy.heal(refused)
        storage.list("")
        refused = proxy.fail(mode)
        for kind, calls in ((StorageUnavailable, READS), (Refused, WRITES)):  # the process has read but not written yet
            assert {type(tried(call, storage, path)) for call in calls.values()} == {kind}, mode
        proxy.heal(refused)
        storage.put("k", b"x")
        refused = proxy.fail(mode)
        for call in WRITES.values():
            error = tried(call, storage, path)
            assert isinstance(error, StorageUnavailable), mode
            assert error.reason == reason
        proxy.heal(refused)
        assert storage.get("k")[0] == b"x"


def test_an_outage_of_s3_says_what_it_is(opened: Callable[..., Storage], proxy: FaultProxy, path: Path) -> None:
    for mode, reason in OUTAGES:
        refused = proxy.fail(mode)
        for call in ALL.values():
            error = tried(call, opened(in_use=True), path)
            assert isinstance(error, StorageUnavailable), mode
            assert error.reason == reason
        proxy.heal(refused)


def test_a_request_that_is_wrong_is_no_outage(opened: Callable[..., Storage], proxy: FaultProxy, path: Path) -> None:
    for mode in ("400 InvalidArgument", "400 EntityTooLarge", "501 NotImplemented"):
        refused = proxy.fail(mode)
        for call in ALL.values():
            error = tried(call, opened(in_use=True), path)
            assert isinstance(error, StorageError), mode
            assert not isinstance(error, StorageUnavailable), mode
        proxy.heal(refused)


PAGE = b"<!doctype html><html><body>Welcome</body></html>"
OTHER_SERVERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "a proxy without the store": (404, {"content-type": "text/html"}, PAGE),
    "an API at the old address": (404, {"content-type": "application/json"}, b'{"error": "not found"}'),
    "nothing here": (404, {}, b""),
    "a login page": (200, {"content-type": "text/html"}, PAGE),
    "an empty page": (200, {}, b""),
    "some XML": (200, {"content-type": "application/xml"}, b'<?xml version="1.0"?><rss/>'),
    "some JSON": (200, {"content-type": "application/json"}, b"{}"),
    "a redirect to a login": (302, {"location": "/login"}, b""),
    "a redirect to itself": (307, {"location": "/"}, b""),
    "a limit of a proxy": (413, {"content-type": "text/html"}, PAGE),
    "a proxy that expects TLS": (400, {"content-type": "text/html"}, PAGE),
    "a condition of a web server": (412, {"content-type": "text/html"}, PAGE),
}


def test_another_server_at_the_address_of_the_store_is_an_outage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        status, headers, body = OTHER_SERVERS[kind]
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    with served(answer) as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        storage, new = open_storage("s3://bucket/prefix", in_use=True), open_storage("s3://bucket/prefix")
        for kind, (status, _, body) in OTHER_SERVERS.items():
            for name, call in ALL.items():
                if name == "delete" and (status, body) == (200, b""):
                    continue  # a possible response of a store
                error = tried(call, storage, path)
                assert isinstance(error, StorageUnavailable), (kind, name)
                assert error.reason in (SILENT, "another server answers at the address of the storage"), (kind, name)
                assert url not in str(error)
            with pytest.raises(StorageError):
                begin_writing(new)


def test_a_worker_without_credentials_is_no_mistake_of_the_job(
    s3_storage: Storage, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
        storage = open_storage(s3_storage.url, in_use=True)
        for call in ALL.values():
            error = tried(call, storage, path)
            assert isinstance(error, StorageUnavailable)
            assert error.reason == DENIED


# ---- a folder

DISK = {
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.EROFS: "the storage is read-only",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EIO: "the storage fails",
    errno.ESTALE: "the storage fails",
    errno.ENOTCONN: "the storage fails",
    errno.EMFILE: "the storage fails",
    errno.EUCLEAN: "the storage fails",
    errno.EBADMSG: "the storage fails",
    errno.EREMOTEIO: "the storage fails",
    errno.ELOOP: "the storage fails",
    errno.EHOSTDOWN: SILENT,
    errno.ETIMEDOUT: SILENT,
}


# Before the first read or write.
FINAL_AT_FIRST = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EUCLEAN, errno.EBADMSG, errno.EREMOTEIO, errno.ELOOP)


@pytest.mark.parametrize("spoiled", [b"", b"[]", b"\0" * 64, b'{"id": "x", "format": 99}', None])
def test_a_marker_that_is_spoiled_in_use_is_an_outage(file_storage: Storage, path: Path, spoiled: bytes | None) -> None:
    begin_writing(file_storage)
    file_storage.put("k", b"x")
    marker = Path(file_storage.url.removeprefix("file://"), MARKER)
    sound = marker.read_bytes()
    marker.unlink()
    if spoiled is None:
        marker.mkdir()
    else:
        marker.write_bytes(spoiled)
    for name, call in ALL.items():
        assert isinstance(tried(call, file_storage, path), StorageUnavailable), name
    with pytest.raises(StorageError) as final:
        open_storage(file_storage.url).get("k")
    assert not isinstance(final.value, StorageUnavailable)
    if spoiled is None:
        marker.rmdir()
    marker.write_bytes(sound)
    assert file_storage.get("k")[0] == b"x"


@pytest.mark.parametrize("number", DISK)
def test_an_error_of_the_disk_is_an_outage_at_each_operation(
    file_storage: Storage, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file_storage.put("k", b"old")
    stat = Path.stat

    def fail(self: Path, **options: Any) -> Any:
        if self.is_relative_to(tmp_path / "storage"):
            raise OSError(number, os.strerror(number))
        return stat(self, **options)

    fresh = open_storage(file_storage.url)
    file_storage.get("k")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        for call in ALL.values():
            error = tried(call, file_storage, path)
            assert isinstance(error, StorageUnavailable)
            assert error.reason == DISK[number]
            final = not isinstance(tried(call, fresh, path), StorageUnavailable)
            assert final == (number in FINAL_AT_FIRST)
    assert file_storage.get("k")[0] == b"old"


@pytest.mark.parametrize("number", DISK)
def test_a_write_that_the_disk_does_not_take_changes_nothing(
    file_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file_storage.put("k", b"old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageUnavailable, match=f"k: put: .*{os.strerror(number)}") as caught:
            file_storage.put("k", b"new")
    assert caught.value.reason == DISK[number]
    assert file_storage.get("k")[0] == b"old"
    assert not list(tmp_path.rglob("*.tmp"))


# ---- runs


class Refusing(Wrapped):
    """Refuse so many operations, from operation `at` on."""

    def __init__(self, inner: Storage, at: int, times: int) -> None:
        super().__init__(inner)
        self.at, self.times, self.operations, self.refused = at, times, 0, 0

    def before(self, verb: str, key: str) -> None:
        self.operations += 1
        if self.operations >= self.at and self.refused < self.times:
            self.refused += 1
            raise Refused(f"{key}: not allowed (403 InvalidAccessKeyId)", DENIED)


@pytest.mark.slow
def test_a_refusal_at_any_moment_fails_no_job_and_stops_no_dispatcher(data: Path) -> None:
    for at in itertools.count(1, 4):
        inner = MemoryStorage()
        cluster, names = eventful(inner, data)
        refusing = Refusing(inner, at, times=5)
        storage: Any = MeasuredStorage(refusing, in_use=True)  # as after `begin_writing`
        storage.inner = inner
        late: list[str] = []
        carry_on(Dispatcher(storage, cluster), 1, names, late, data)
        if not refusing.refused:
            break
        check_the_end(inner, cluster, [*names, *late])
    assert at > 100


def test_genmodels_run_shows_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_run, "POLL_SECONDS", 0.0)
    states: list[tuple[str, str]] = []
    inner = MemoryStorage()
    refusing = Refusing(inner, 16, times=4)
    storage = MeasuredStorage(refusing)
    begin_writing(storage)

    class Backend(Drivers):
        def start(self, *arguments: Any) -> Any:
            if not self.drivers and not states.count(("starting", "the disk of this machine is full")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().start(*arguments)

    def watch(status: Any, heartbeat: Any) -> None:
        states.append((status.state, heartbeat.waiting if heartbeat else ""))

    status, _ = run_to_completion(storage, Backend(inner, succeeds), "job-00000000", "model", 1, watch)
    assert (status.state, status.attempt, refusing.refused) == ("succeeded", 1, 4)
    assert DENIED in {waiting for _, waiting in states}


TROUBLES: list[Callable[[], Exception]] = [
    lambda: StorageError("a damaged lease"),
    lambda: ValueError("1 validation error for _Lease"),
    lambda: OSError(errno.EMFILE, "Too many open files"),
    lambda: KeyError("lease_term"),
    lambda: RuntimeError("can't start new thread"),
    lambda: RecursionError("maximum recursion depth exceeded"),
]


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("where", ["lease", "jobs", "capacity", "notifications"])
def test_the_dispatcher_outlives_whatever_happens(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Any, where: str
) -> None:
    storage, remaining = MemoryStorage(), Counter({where: 3})
    name = submit(storage, data, "one", "a")
    cluster, lease = Cluster(storage), Lease(storage)
    dispatcher = Dispatcher(storage, cluster, lease)

    def troubled(target: Any, method: str, place: str) -> None:
        works = getattr(target, method)

        def call(*arguments: Any, **options: Any) -> Any:
            if remaining[place]:
                remaining[place] -= 1
                raise trouble()
            return works(*arguments, **options)

        monkeypatch.setattr(target, method, call)

    troubled(lease, "try_acquire", "lease")
    troubled(dispatcher.jobs, "open", "jobs")
    troubled(dispatcher_module, "notifications", "notifications")
    troubled(cluster, "capacity", "capacity")
    monkeypatch.setattr("services.dispatch.dispatcher.POLL_SECONDS", 0.001)
    stop = threading.Event()
    with caplog.at_level(logging.WARNING, "genmodels.dispatch"):
        thread = threading.Thread(target=dispatcher.run, args=(stop,))
        thread.start()
        try:
            ended = threading.Event()
            for _ in range(2000):
                if state(storage, name, "a").state == "succeeded":
                    break
                ended.wait(0.01)
        finally:
            stop.set()
            thread.join(20)
    assert state(storage, name, "a").state == "succeeded"
    assert remaining[where] == 0
    assert len([record for record in caplog.records if "the next round follows" in record.message]) == 1


class PlainDrivers(SubprocessBackend):
    """Run real drivers and workers without Ray."""

    def start(self, storage_url: str, job: str, model: str, attempt: int, workers: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("services.dispatch.backends.local_process.turns_command", _plain_turns)
            return super().start(storage_url, job, model, attempt, workers)


def _plain_turns(channel: int) -> list[str]:
    return [sys.executable, "-m", "tests.support.plain_turns", str(channel)]


@pytest.mark.long
def test_a_real_run_outlasts_refusals_at_the_start_in_training_and_in_publishing(
    s3_storage: Storage, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Supervisor, driver and worker are separate processes, and the store refuses all of them."""
    entry = model(make_data(tmp_path), "minigpt", max_steps=400, save_every=200, eval_every=200)
    name = submit_here(s3_storage, job("refused", entry))
    storage = open_storage(s3_storage.url)
    begin_writing(storage)
    counts, shown, modes = Counter[str](), set(), itertools.cycle(mode for mode, _ in REFUSALS)

    def choose() -> str:
        counts["to refuse"] -= 1
        return next(modes) if counts["to refuse"] >= 0 else "ok"

    def watch(status: Any, heartbeat: Any) -> None:
        shown.add(heartbeat.waiting if heartbeat else "")
        phase = heartbeat.phase if heartbeat else status.state
        if phase in ("starting", "training", "publishing") and not counts[phase]:
            counts[phase], counts["to refuse"] = 1, 5

    proxy.fail_at_random(choose)
    backend = PlainDrivers(tmp_path / "logs", {"PYTHONPATH": str(ROOT)})
    status, result = run_to_completion(storage, backend, name, "minigpt", 1, watch)
    proxy.heal()
    assert (status.state, status.attempt) == ("succeeded", 1), status.history
    assert result is not None
    assert (result.step, counts["starting"], counts["training"], counts["publishing"]) == (400, 1, 1, 1)
    assert [row["step"] for row in metric_rows(Run(s3_storage, name, "minigpt")) if "loss" in row] == [*range(1, 401)]
    assert DENIED in shown


# ---- serving


def test_keys_that_were_seen_work_on_and_others_are_told_to_wait(
    s3_storage: Storage, opened: Callable[..., Storage], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, token = Keys(s3_storage).create("alice", ("generate",))
    _, unseen = Keys(s3_storage).create("bob", ("generate",))
    monkeypatch.setattr("genmodels.keys.FRESH_SECONDS", 0.0)
    for mode, _ in REFUSALS:
        keys = Keys(opened(in_use=True))
        refused = proxy.fail(mode)
        with pytest.raises(StorageUnavailable):  # a gateway that starts in the outage
            keys.check(token)
        proxy.heal(refused)
        assert keys.check(token)
        refused = proxy.fail(mode)
        assert keys.check(token)
        with pytest.raises(StorageUnavailable):
            keys.check(unseen)
        proxy.heal(refused)
