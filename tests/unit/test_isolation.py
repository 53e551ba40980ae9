"""Test that a fault of one model, round or thread affects no other, is reported, and is retried."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save

from genmodels import checkpoint, threads
from genmodels.engine import loader, model_cache
from genmodels.errors import CheckpointError, StorageError, StorageUnavailable, UnexpectedFailure, contained
from genmodels.metrics import THREAD_FAILURES, THREAD_PROGRESS
from genmodels.registry.probe import PROBE
from genmodels.registry.store import Registry
from genmodels.runs import control
from genmodels.runs.control import CommandWatcher
from genmodels.runs.logs import LogShipper
from genmodels.runs.store import Run
from genmodels.storage import Storage, read_document, write_document
from genmodels.storage.lease import Lease
from genmodels.threads import Rounds
from services.dispatch.dispatcher import Dispatcher
from services.gateway import model_host
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from services.jobs.app import create_app as create_jobs
from tests.support.asgi_client import ask, refused
from tests.support.metric_values import value
from tests.support.published_models import publish
from tests.support.ray_node import until
from tests.support.scripted_cluster import Cluster
from tests.support.storages import FailingStorage, MemoryStorage
from tests.support.watched_hosts import watch

GENERATE = {"n": 1, "seed": 1}
LOG = logging.getLogger("test")


def wrong_document() -> ValidationError:
    class Whole(BaseModel):
        number: int

    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({})
    return caught.value


FAILURES: dict[str, Callable[[], Exception]] = {
    "no inodes": lambda: OSError(errno.ENOSPC, "No space left on device", "/secret/path"),
    "too many files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "no memory": lambda: MemoryError(),
    "deep": lambda: RecursionError("maximum recursion depth exceeded"),
    "torch": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] can't allocate memory"),
    "a bug": lambda: KeyError("n_layer"),
    "a document": wrong_document,
    "text": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "an assertion": lambda: AssertionError(),
    "nothing to say": lambda: Exception(),
}


@pytest.fixture
def good_and_bad(file_storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(model_host, "WATCH_SECONDS", 3600.0)  # the tests decide when to poll
    for name in ("good", "bad"):
        publish(file_storage, name, "vae", step=1)
    return file_storage


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Return a dict: the load of a version that it names raises the exception given there."""
    raised: dict[str, Exception] = {}
    real = loader.load

    def load(storage: Storage, ref: Any, *rest: Any) -> Any:
        if ref.name in raised:
            raise raised[ref.name]
        return real(storage, ref, *rest)

    monkeypatch.setattr(model_cache, "load", load)
    monkeypatch.setattr(model_cache, "RETRY_SECONDS", 0.0)
    return raised


def shown(app: Any, name: str) -> dict[str, Any]:
    response = ask(app, "GET", f"/v1/models/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def answered_by(app: Any, name: str) -> str:
    response = ask(app, "POST", "/v1/images/generations", {"model": name, **GENERATE})
    assert response.status_code == 200, response.text
    return response.headers["x-genmodels-version"]


@pytest.mark.parametrize("kind", FAILURES)
def test_whatever_a_load_raises_is_that_models_refusal(
    good_and_bad: Storage, failing: dict[str, Exception], kind: str
) -> None:
    host = ModelHost(good_and_bad.url, pin=8)
    app = create_app(host)
    failing["bad@2"] = FAILURES[kind]()
    for name in ("bad", "good"):  # bad comes first
        publish(good_and_bad, name, "vae", step=2)
    for _ in range(2):
        watch(host)
    assert (answered_by(app, "bad"), answered_by(app, "good")) == ("bad@1", "good@2")
    (refusal,) = shown(app, "bad")["refused"]
    assert (refusal["alias"], refusal["version"]) == ("production", 2)
    assert refusal["reason"]
    assert "/secret/path" not in refusal["reason"]
    response = ask(app, "POST", "/v1/images/generations", {"model": "bad@2", **GENERATE})
    assert refused(response, 503)["code"] == "version_damaged"
    assert "refused" not in shown(app, "good")
    del failing["bad@2"]
    watch(host)
    assert answered_by(app, "bad") == "bad@2"
    assert "refused" not in shown(app, "bad")


def test_an_object_that_storage_never_returns_holds_up_no_other_model(
    good_and_bad: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """Three other models cannot be read either: with so many, a round ends, and the next one begins with the rest."""
    ill = ["bad", "bad-a", "bad-b"]
    for name in ill[1:]:
        publish(good_and_bad, name, "vae", step=1)
    host = ModelHost(good_and_bad.url, pin=[*ill, "good"])
    app = create_app(host)
    host._watcher._storage = storage = FailingStorage(good_and_bad, "models/bad")
    storage.away = True
    for name in (*ill, "good"):  # "good" comes last
        publish(good_and_bad, name, "vae", step=2)
    for _ in range(3):
        watch(host)
    assert [answered_by(app, name) for name in (*ill, "good")] == ["bad@1", "bad-a@1", "bad-b@1", "good@2"]
    assert "storage does not answer for it" in shown(app, "bad")["refused"][0]["reason"]
    warnings = [message for message in caplog.messages if message.startswith("bad@production: ")]
    assert len(warnings) == 1, "once, not in each round"
    storage.away = False
    watch(host)
    assert answered_by(app, "bad") == "bad@2"
    assert "refused" not in shown(app, "bad")


def test_a_checkpoint_whose_last_request_is_not_known_is_looked_up_again(good_and_bad: Storage) -> None:
    """A request may load it at the very moment at which the watcher forgets it."""
    host = ModelHost(good_and_bad.url, pin=0)
    watcher = host._watcher
    watcher.loaded("good@live", watcher.resolve("good"))  # as if `live` were the same files
    assert [model.model for model in watcher.serving()] == ["good"]
    watcher._requested.clear()
    watcher.refresh()
    assert watcher.refused == {}
    assert watcher.serving() == []


@pytest.mark.parametrize("kind", FAILURES)
def test_a_new_replica_starts_whatever_a_model_does(
    good_and_bad: Storage, failing: dict[str, Exception], kind: str
) -> None:
    failing["bad@1"] = FAILURES[kind]()
    app = create_app(ModelHost(good_and_bad.url, pin=8))
    assert answered_by(app, "good") == "good@1"
    answer = ask(app, "GET", "/v1/models/bad")
    assert answer.status_code == 503 or answer.json()["problem"]
    assert ask(app, "GET", "/healthz").status_code == 200


def replace_file(storage: Storage, model: str, number: int, name: str, data: bytes) -> None:
    """Replace a file of a version, with a correct digest, as a publisher with a bug would."""
    key = f"models/{model}/versions/{number:08d}.json"
    document, etag = read_document(storage, key)
    sha256 = hashlib.sha256(data).hexdigest()
    storage.put(f"models/{model}/blobs/{sha256}", data)
    document["files"][name] = {"size": len(data), "sha256": sha256}
    write_document(storage, key, document, if_match=etag)


FILES: dict[str, tuple[str, bytes]] = {
    "a deep config": (checkpoint.CONFIG, b"[" * 200_000),
    "a deep object": (checkpoint.CONFIG, b'{"family": "vae", "config": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}"),
    "an empty config": (checkpoint.CONFIG, b""),
    "a config of numbers": (checkpoint.CONFIG, json.dumps({"family": 1, "config": 2, "data": 3}).encode()),
    "an unknown family": (checkpoint.CONFIG, json.dumps({"family": "x", "config": {}, "data": {}}).encode()),
    "a probe of bool": (PROBE, save({"images": torch.zeros(2, dtype=torch.bool)})),
    "a probe of nothing": (PROBE, save({})),
    "a probe of another name": (PROBE, save({"other": torch.zeros(2)})),
    "a probe that is none": (PROBE, b"\xff" * 64),
    "weights of bool": (checkpoint.WEIGHTS, save({"x": torch.zeros(2, dtype=torch.bool)})),
    "weights of nothing": (checkpoint.WEIGHTS, b""),
    "a density that is none": ("assets/density.safetensors", b"{"),
}


@pytest.mark.parametrize("case", FILES)
def test_whatever_a_versions_files_are_the_other_models_move_on(good_and_bad: Storage, case: str) -> None:
    host = ModelHost(good_and_bad.url, pin=8)
    app = create_app(host)
    for name in ("bad", "good"):
        publish(good_and_bad, name, "vae", step=2)
    replace_file(good_and_bad, "bad", 2, *FILES[case])
    watch(host)
    assert answered_by(app, "good") == "good@2"
    assert answered_by(app, "bad") == "bad@1"
    assert shown(app, "bad")["refused"][0]["version"] == 2
    assert answered_by(create_app(ModelHost(good_and_bad.url, pin=8)), "good") == "good@2"


def test_a_disk_without_inodes_at_a_swap_is_told_and_the_swap_comes_after(
    good_and_bad: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "RETRY_SECONDS", 0.0)
    host = ModelHost(good_and_bad.url, pin=8)
    app = create_app(host)
    publish(good_and_bad, "good", "vae", step=2)

    def full() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "scratch_folder", full)
        watch(host)
        assert answered_by(app, "good") == "good@1"
        assert "No space left on device" in shown(app, "good")["refused"][0]["reason"]
    watch(host)
    assert answered_by(app, "good") == "good@2"


# ---- health


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that advances the clock of `threads` only."""
    passed = [0.0]
    real = time

    class Clock:
        time = staticmethod(real.time)

        @staticmethod
        def monotonic() -> float:
            return real.monotonic() + passed[0]

    monkeypatch.setattr(threads, "time", Clock)

    def let(seconds: float) -> None:
        passed[0] += seconds

    return let


def test_a_host_whose_rounds_do_not_complete_is_not_well(
    good_and_bad: Storage, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ModelHost(good_and_bad.url, pin=8)
    app = create_app(host)
    stamped = value(THREAD_PROGRESS, "alias-watcher")
    assert stamped > 0
    clock(threads.STALLED_SECONDS + 1)
    error = refused(ask(app, "GET", "/healthz"), 503)
    assert "'alias-watcher' has made no progress" in error["message"]
    with pytest.raises(RuntimeError, match="no progress"):
        host.check_health()
    watch(host)
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}
    host.check_health()
    clock(threads.STALLED_SECONDS + 1)

    def broken() -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(host._watcher, "refresh", broken)
    failures = value(THREAD_FAILURES, "alias-watcher")
    watch(host)
    assert "broken" in refused(ask(app, "GET", "/healthz"), 503)["message"]
    host.check_health()  # a new process would fail too: this process still answers
    assert value(THREAD_FAILURES, "alias-watcher") == failures + 1
    assert answered_by(app, "good") == "good@1"


def test_an_outage_of_the_store_makes_no_host_unwell(
    good_and_bad: Storage, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ModelHost(good_and_bad.url, pin=8)

    def away() -> None:
        raise StorageUnavailable("no answer")

    monkeypatch.setattr(host._watcher, "refresh", away)
    clock(threads.STALLED_SECONDS + 1)
    watch(host)
    assert ask(create_app(host), "GET", "/healthz").status_code == 200
    host.check_health()


def test_a_job_service_whose_dispatcher_stands_still_is_not_well(clock: Callable[[float], None]) -> None:
    storage = MemoryStorage()
    dispatcher = Dispatcher(storage, Cluster(storage))
    app = create_jobs(storage, keys=None, hosts=None, stalled=dispatcher.stalled)
    assert ask(app, "GET", "/healthz").json() == {"status": "ok"}
    clock(threads.STALLED_SECONDS + 1)
    assert "'dispatch' has made no progress" in refused(ask(app, "GET", "/healthz"), 503)["message"]


# ---- threads go on


@pytest.mark.parametrize("kind", FAILURES)
def test_a_round_contains_whatever_it_raises(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rounds = Rounds("commands", LOG)
    before = value(THREAD_FAILURES, "commands")
    for _ in range(3):
        with rounds.round():
            raise FAILURES[kind]()
    assert value(THREAD_FAILURES, "commands") == before + 3
    assert len(caplog.messages) == 1, "the same error is told once"
    with pytest.raises(StorageUnavailable), rounds.round(StorageUnavailable):
        raise StorageUnavailable("passes")


@pytest.mark.parametrize("kind", FAILURES)
def test_any_exception_becomes_one_clear_line(kind: str) -> None:
    error = contained(FAILURES[kind]())
    assert isinstance(error, UnexpectedFailure)
    assert str(error)
    assert "\n" not in str(error)
    ours = CheckpointError("damaged")
    assert contained(ours) is ours


def test_commands_are_heard_after_a_look_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOOK_SECONDS", 0.01)
    run = Run(MemoryStorage(), "job-00000000", "m")
    failures, looks = [RecursionError(), KeyError("x"), MemoryError()], 0
    real = Run.commands

    def flaky(self: Run, *arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        if failures:
            raise failures.pop()
        return real(self, *arguments, **options)

    monkeypatch.setattr(Run, "commands", flaky)
    with CommandWatcher(run, 1, None) as watch:  # nothing is killed
        run.send_command("stop", 1, "asked")
        assert watch.should_stop.wait(10)
    assert looks > 3


def test_logs_are_shipped_after_a_round_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(MemoryStorage(), "job-00000000", "m")
    shipper = LogShipper(run, 1, "driver")
    rounds = iter([RuntimeError("bug"), OSError(errno.ENOSPC, "full"), None])
    done = threading.Event()

    def work() -> None:
        if error := next(rounds, None):
            raise error
        done.set()
        shipper.closing.set()

    shipper._every(0.001, work, "ship-log")
    assert done.is_set()


@pytest.mark.parametrize("error", [StorageError("refused"), KeyError("bug"), RecursionError()])
def test_a_dispatcher_goes_on_after_a_tick_that_failed(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.dispatch.dispatcher.POLL_SECONDS", 0.01)
    storage = FailingStorage()
    dispatcher = Dispatcher(storage, Cluster(storage), Lease(storage, 0.4))
    stop, rounds_seen = threading.Event(), []

    def dispatch_once(lease_term: int) -> None:
        rounds_seen.append(lease_term)
        if len(rounds_seen) % 2:
            raise error

    monkeypatch.setattr(dispatcher, "dispatch_once", dispatch_once)
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    until(lambda: len(rounds_seen) >= 6, "it continues")
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert set(rounds_seen) == {1}, "under one and the same lease"


def test_a_renewer_goes_on_after_a_renewal_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    dispatcher = Dispatcher(storage, Cluster(storage), Lease(storage, 0.04))
    over, renewals = threading.Event(), []

    def renew() -> None:
        renewals.append(1)
        if len(renewals) == 3:
            over.set()
        raise RuntimeError("bug")

    monkeypatch.setattr(dispatcher.lease, "renew", renew)
    dispatcher._renew(over)
    assert len(renewals) == 3


def test_registry_names_are_those_of_models_alone(file_storage: Storage, tmp_path: Path) -> None:
    for key in ("models/.Trash/versions/00000001.json", "models/UPPER/versions/00000001.json", "models/x/versions/a"):
        file_storage.put(key, b"{}")
    assert Registry(file_storage).models() == []
