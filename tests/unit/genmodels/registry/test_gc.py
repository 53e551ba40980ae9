"""Test clean-up: which objects are removed, which stay, and that no process loses objects that it needs now."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genmodels import checkpoint
from genmodels.checkpoint import MANIFEST, CheckpointRef, Manifest
from genmodels.errors import GenmodelsError, ModelNotFound, SpecError, StorageUnavailable
from genmodels.registry import gc as gc_module
from genmodels.registry import gc_checkpoints, references
from genmodels.registry.gc import gc
from genmodels.registry.removal import delete_version
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.runs.jobs import Entry, Jobs
from genmodels.runs.metric_rows import metric_rows
from genmodels.runs.records import Change, State, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import dump, parse_spec
from genmodels.storage import Storage, write_document
from genmodels.storage import lease as lease_module
from genmodels.storage.documents import now
from tests.support.published_models import build, write
from tests.support.run_parts import write_metrics
from tests.support.storages import LINEAGE, FailingStorage, MemoryStorage, PausedStorage, Wrapped, save

LONG_AGO = "2020-01-01T00:00:00.000+00:00"
JOB = "shapes-00000000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of a verified checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder, *build("minigpt"))
    return folder


def publish(storage: Storage, folder: Path, step: int = 1, job: str = JOB) -> Version:
    manifest = Manifest(step=step, samples=step, metrics={}, lineage=LINEAGE, files={})
    with checkpoint.scratch_folder() as name:
        own = shutil.copytree(folder, Path(name, "fetched"))
        return Registry(storage).publish(
            Run(storage, job, "model"), CheckpointRef(attempt=1, step=step), manifest, own, None
        )


def version_without_files(storage: Storage, step: int) -> None:
    version = {"model": "model", "version": 1, "family": "vae", "job": JOB, "checkpoint": {"attempt": 1, "step": step}}
    rest = {
        "metrics": {},
        "gate": None,
        "lineage": LINEAGE.model_dump(),
        "created": "2026-01-01T00:00Z",
        "files": {},
    }
    write_document(storage, "models/model/versions/00000001.json", version | rest)


def is_whole(storage: Storage, version: Version, tmp_path: Path) -> bool:
    target = tmp_path / "whole"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    Registry(storage).fetch(version, target)  # raises where a byte is missing
    return Registry(storage).version(version.model, version.version) == version


def run_of(storage: Storage, job: str = JOB, gate: dict[str, Any] | None = None) -> Run:
    serve = {"gate": gate} if gate else {}
    model = {"name": "model", "model": {"family": "vae"}, "data": {"dataset": "digits"}, "serve": serve}
    spec = parse_spec(json.dumps({"name": "shapes", "models": [model]}).encode(), "spec")
    storage.put(f"jobs/{job}/spec.json", dump(spec))
    return Run(storage, job, "model")


def ended(run: Run, state: State = "succeeded", at: str = LONG_AGO) -> None:
    run.write_status(Status(state=state, attempt=9, history=[Change(state=state, time=at, reason="")]), run.status()[1])


def unfinished(run: Run, attempt: int, step: int) -> str:
    key = f"{run.checkpoint_prefix(CheckpointRef(attempt=attempt, step=step))}/state/model.safetensors"
    run.storage.put(key, b"x" * 1000)
    return key


def collect(storage: Storage) -> list[tuple[str, str]]:
    """Return the removed objects by reason, in short form."""
    plan = gc(storage)
    assert gc(storage) == plan  # a plan changes nothing
    plan.carry_out()
    assert gc(storage).items == []
    return [(item.key.removeprefix(f"runs/{JOB}/model/"), item.why) for item in plan.items]


USELESS = "neither the newest nor the best of a run that has ended"


# ---- checkpoints


def test_the_newest_and_the_best_stay(storage: Storage) -> None:
    run = run_of(storage, gate={"metric": "val_loss", "max": 9.0})
    run.start_attempt(1, None, 1)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan"))]:
        save(run, 1, step, val_loss=loss)
    late = unfinished(run, 1, 5)
    write_metrics(run, 1, [{"step": 1}])
    ended(run)
    plan = gc(storage)
    assert [item.bytes for item in plan.items if item.why == "an upload that never ended"] == [1000]
    assert all(item.bytes > 100 for item in plan.items)
    assert collect(storage) == [
        ("attempt-1/checkpoints/step-00000001/", USELESS),
        ("attempt-1/checkpoints/step-00000003/", USELESS),
        ("attempt-1/checkpoints/step-00000005/", "an upload that never ended"),
    ]
    assert [ref.step for ref in run.checkpoints()] == [2, 4]
    assert len(storage.list(f"{run.prefix}/attempt-1/checkpoints/")) == 4
    assert not storage.exists(late)
    assert len(list(metric_rows(run))) == 1


@pytest.mark.parametrize(("state", "kept"), [("succeeded", [3]), ("failed", [2, 3]), ("cancelled", [2, 3])])
def test_one_that_may_be_resumed_keeps_two(state: State, kept: list[int]) -> None:
    run = run_of(MemoryStorage())
    run.start_attempt(1, None, 1)
    for step in (1, 2, 3):
        save(run, 1, step)
    ended(run, state)
    collect(run.storage)
    assert [ref.step for ref in run.checkpoints()] == kept


def test_what_is_named_stays() -> None:
    storage = MemoryStorage()
    run = run_of(storage)
    run.start_attempt(1, None, 1)
    for step in range(1, 7):
        save(run, 1, step)
    ended(run)
    references.resolve_reference(f"model@{JOB}:step-2", storage)
    version_without_files(storage, step=4)
    collect(storage)
    assert [ref.step for ref in run.checkpoints()] == [2, 4, 6]


def test_what_superseded_attempts_wrote_goes() -> None:
    run = run_of(MemoryStorage())
    run.start_attempt(1, None, 1)
    save(run, 1, 3)
    parent = save(run, 1, 6)
    run.start_attempt(2, parent, 1)
    save(run, 2, 9, parent)
    run.fence = lambda attempt: None
    save(run, 1, 9)  # attempt 1 was paused
    ended(run)
    assert collect(run.storage) == [
        ("attempt-1/checkpoints/step-00000003/", USELESS),
        ("attempt-1/checkpoints/step-00000006/", USELESS),
        ("attempt-1/checkpoints/step-00000009/", "written by an attempt after a newer attempt had started"),
    ]
    assert run.checkpoints() == [CheckpointRef(attempt=2, step=9)]


def test_what_cannot_be_judged_stays() -> None:
    storage = MemoryStorage()
    run = run_of(storage)
    run.start_attempt(1, None, 1)
    for step in (1, 2, 3):
        save(run, 1, step)
    ended(run)
    damaged = f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=1))}/{MANIFEST}"
    storage.put(damaged, b"{")
    unread = run_of(storage, "shapes-11111111")
    unread.start_attempt(1, None, 1)
    for step in (1, 2):
        save(unread, 1, step)
    ended(unread)
    storage.put("jobs/shapes-11111111/spec.json", b"models: [{family: of tomorrow}]")
    lost = run_of(storage, "shapes-22222222")
    for step in (1, 2):
        save(lost, 1, step)
    lost.start_attempt(2, CheckpointRef(attempt=1, step=2), 1)  # from an attempt that was not started
    ended(lost)
    assert collect(storage) == [("attempt-1/checkpoints/step-00000002/", USELESS)]
    assert storage.exists(damaged)
    assert len(storage.list(unread.prefix)) == len(storage.list(lost.prefix)) == 6


@pytest.mark.parametrize("state", ["queued", "starting", "running", "publishing", "succeeded", "failed", "cancelled"])
def test_open_jobs_and_young_runs_are_spared(state: State) -> None:
    storage = MemoryStorage()
    job, _ = Jobs(storage).submit(Jobs(run_of(storage).storage).spec(JOB))
    running, young = Run(storage, job, "model"), run_of(storage)
    for run in (running, young):
        run.start_attempt(1, None, 1)
        for step in (1, 2, 3):
            save(run, 1, step)
        unfinished(run, 1, 4)
    ended(running, state)
    ended(young, state, now())
    before = {key for key in storage.objects if not key.startswith("gc/")}
    assert collect(storage) == []
    assert {key for key in storage.objects if not key.startswith("gc/")} == before


def test_one_that_nobody_touched_is_spared() -> None:
    run = run_of(MemoryStorage())
    run.start_attempt(1, None, 1)
    unfinished(run, 1, 1)
    assert collect(run.storage) == []


def test_resumed_after_the_plan() -> None:
    storage = MemoryStorage()
    job, _ = Jobs(storage).submit(Jobs(run_of(storage).storage).spec(JOB))
    run = Run(storage, job, "model")
    run.start_attempt(1, None, 1)
    for step in (1, 2, 3):
        save(run, 1, step)
    ended(run)
    Jobs(storage).close(job, LONG_AGO, {"model": "succeeded"})
    plan = gc(storage)
    assert len(plan.items) == 2
    Jobs(storage).reopen(job)
    plan.carry_out()
    assert len(run.checkpoints()) == 3


def test_an_upload_that_ends_after_all() -> None:
    run = run_of(MemoryStorage())
    run.start_attempt(1, None, 1)
    unfinished(run, 1, 1)
    ended(run)
    plan = gc(run.storage)
    assert len(plan.items) == 1
    save(run, 1, 1)
    plan.carry_out()
    assert len(run.checkpoints()) == 1
    assert run.storage.exists(f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=1))}/{checkpoint.WEIGHTS}")


def test_pinned_at_any_moment_of_its_removal() -> None:
    outcomes = set()
    for moment in itertools.count(1):
        inner = MemoryStorage()
        run = run_of(inner)
        run.start_attempt(1, None, 1)
        for step in (1, 2):
            save(run, 1, step)
        ended(run)
        (item,) = gc(inner).items
        whole = inner.list(item.key)
        pinned: list[str] = []

        def meanwhile(inner: Storage = inner, pinned: list[str] = pinned) -> None:
            with suppress(SpecError):  # the message says that it is gone
                pinned.append(references.resolve_reference(f"model@{JOB}:step-1", inner))

        store = PausedStorage(inner, moment, meanwhile)
        gc_checkpoints.remove_checkpoint(store, item)
        if store.operations < moment:
            break
        assert inner.list(item.key) == (whole if pinned else []), moment
        outcomes.add(bool(pinned))
    assert outcomes == {True, False}


def test_removal_that_was_cut_off_is_taken_up_again() -> None:
    run = run_of(MemoryStorage())
    run.start_attempt(1, None, 1)
    for step in (1, 2):
        save(run, 1, step)
    ended(run)
    store = FailingStorage(run.storage, only=checkpoint.WEIGHTS)
    store.away = True
    with pytest.raises(StorageUnavailable):
        gc(store).carry_out()
    assert collect(run.storage) == [("attempt-1/checkpoints/step-00000001/", "an upload that never ended")]
    assert len(run.storage.list(f"{run.prefix}/attempt-1/checkpoints/")) == 2


def test_the_store_is_away() -> None:
    run = run_of(MemoryStorage())
    ended(run)
    store = FailingStorage(run.storage)
    store.away = True
    with pytest.raises(StorageUnavailable):
        gc(store)


# ---- submissions


def test_submissions_that_never_ended(storage: Storage) -> None:
    jobs = Jobs(storage)
    alive, _ = jobs.submit(jobs.spec(run_of(storage).job))
    for job, time_ in [("dead-00000000", LONG_AGO), ("young-00000000", now())]:
        entry = Entry(job=job, name="x", priority=0, submitted=time_, caller="", models=["model"])
        write_document(storage, f"open/{job}", entry.model_dump())
    assert collect(storage) == [("open/dead-00000000", "a submission that never ended")]
    assert jobs.open() == sorted([alive, "young-00000000"])


def test_a_submission_that_ends_at_any_moment_stays() -> None:
    for moment in itertools.count(1):
        inner = MemoryStorage()
        run_of(inner)
        spec = inner.objects.pop(f"jobs/{JOB}/spec.json")
        entry = Entry(job=JOB, name="x", priority=0, submitted=LONG_AGO, caller="", models=["model"])
        write_document(inner, f"open/{JOB}", entry.model_dump())
        store = PausedStorage(inner, moment, lambda inner=inner, spec=spec: inner.put(f"jobs/{JOB}/spec.json", spec))
        Jobs(store).forget(JOB)
        if store.operations < moment:
            assert Jobs(inner).open() == []
            assert moment > 4
            return
        assert Jobs(inner).open() == [JOB], moment
        assert Jobs(inner).entry(JOB) == entry


# ---- versions and their files


def test_a_version_is_deleted_and_its_files_after_it(storage: Storage, folder: Path, tmp_path: Path) -> None:
    registry = Registry(storage)
    first, second = publish(storage, folder, 1), publish(storage, folder, 2)
    storage.put("models/model/blobs/" + "0" * 64, b"x" * 77)
    assert [(item.bytes, item.why) for item in gc(storage).items] == [(77, "a file of no version")]
    registry.promote("model", "production", 2, "")
    with pytest.raises(GenmodelsError, match=r"alias 'production' names model@2; .*genmodels promote model@VERSION"):
        delete_version(registry, "model", 2)
    delete_version(registry, "model", 1)
    assert registry.versions("model") == [2]
    with pytest.raises(ModelNotFound, match="no version 1"):
        delete_version(registry, "model", 1)
    with pytest.raises(ModelNotFound, match="no version 1"):
        registry.promote("model", "production", 1, "")
    assert len(collect(storage)) == 1  # both have the same files
    assert is_whole(storage, second, tmp_path)
    registry.promote("model", "other", 2, "")
    assert registry.aliases("model")["production"].version == 2
    again = publish(storage, folder, 1)
    assert again.version == 3  # a number is never reused
    assert again.files == first.files


def test_the_newest_number_is_not_given_again(folder: Path) -> None:
    storage = MemoryStorage()
    publish(storage, folder, 1)
    delete_version(Registry(storage), "model", 1)
    assert Registry(storage).models() == []
    plan = gc(storage)
    assert len(plan.items) == len(storage.list("models/model/blobs/")) > 3
    plan.carry_out()
    assert storage.list("models/model/blobs/") == []
    assert publish(storage, folder, 2).version == 2


def test_a_number_that_came_and_went_while_one_published(folder: Path) -> None:
    inner = MemoryStorage()

    class Paused(Wrapped):
        def before(self, verb: str, key: str) -> None:
            if verb == "put" and key.endswith("/versions/00000001.json") and not inner.list("models/model/deleted/"):
                publish(inner, folder, 1)
                delete_version(Registry(inner), "model", 1)

    assert publish(Paused(inner), folder, 2).version == 2
    assert Registry(inner).versions("model") == [2]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set an event when a process waits for a lease."""
    event = threading.Event()

    def sleep(_: float) -> None:
        event.set()
        time.sleep(0.001)

    for module in (lease_module, gc_module):
        clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic, time=time.time)
        monkeypatch.setattr(module, "time", clock)
    return event


class Concurrent:
    """Do work in a thread, until it is done or waits for the lease."""

    def __init__(self, work: Callable[[], Any], waiting: threading.Event) -> None:
        self.work, self.quiet, self.result = work, waiting, None
        waiting.clear()
        self.thread = threading.Thread(target=self._run)

    def __call__(self) -> None:
        self.thread.start()
        assert self.quiet.wait(30)

    def join(self) -> Any:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def _run(self) -> None:
        try:
            self.result = self.work()
        except Exception as error:
            self.result = error
        finally:
            self.quiet.set()


def orphans(storage: Storage, folder: Path) -> None:
    """Write the files of a version whose publisher died before it wrote the version."""
    publish(storage, folder)
    storage.delete("models/model/versions/00000001.json")


def test_published_at_any_moment_of_a_clean_up(folder: Path, tmp_path: Path, waiting: threading.Event) -> None:
    for moment in itertools.count(1):
        inner = MemoryStorage()
        orphans(inner, folder)
        concurrent = Concurrent(lambda inner=inner: publish(inner, folder), waiting)
        store = PausedStorage(inner, moment, concurrent)
        gc(store).carry_out()
        if store.operations < moment:
            assert moment > 10
            assert inner.list("models/model/blobs/") == []
            return
        assert is_whole(inner, concurrent.join(), tmp_path), moment


def test_cleaned_up_at_any_moment_of_publishing(folder: Path, tmp_path: Path) -> None:
    for before in (lambda storage: None, lambda storage: orphans(storage, folder)):
        for moment in itertools.count(1):
            inner = MemoryStorage()
            before(inner)
            store = PausedStorage(inner, moment, lambda inner=inner: gc(inner).carry_out())
            version = publish(store, folder)
            assert is_whole(inner, version, tmp_path), moment
            if store.operations < moment:
                assert moment > 8
                break


def test_one_who_died_publishing_is_followed_by_another(folder: Path, tmp_path: Path) -> None:
    """The version exists, but one of its files was deleted before the version was written."""
    storage = MemoryStorage()
    version = publish(storage, folder)
    for key in Registry(storage).keys(version).values():
        storage.delete(key)
    assert publish(storage, folder) == version
    assert is_whole(storage, version, tmp_path)


def test_a_clean_up_that_sleeps_too_long_deletes_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps two minutes at any moment, except in the deletion's own request, which times out before."""
    clock = SimpleNamespace(now=0.0, time=time.time)
    clock.monotonic = lambda: clock.now

    def sleep(_: float) -> None:
        clock.now += 1

    clock.sleep = sleep
    for module in (lease_module, gc_module):
        monkeypatch.setattr(module, "time", clock)

    class Sleeping(PausedStorage):
        def before(self, verb: str, key: str) -> None:
            if verb != "delete":
                super().before(verb, key)

    slept = 0
    for moment in itertools.count(1):
        inner = MemoryStorage()
        orphans(inner, folder)
        version_without_files(inner, step=7)  # the clean-up reads it after the list of versions
        result: list[Version] = []
        store = Sleeping(inner, moment, lambda inner=inner, result=result: result.append(publish(inner, folder)))
        began = clock.now
        gc(store).carry_out()
        if store.operations < moment:
            break
        assert is_whole(inner, result[0], tmp_path), moment
        slept += clock.now - began >= 120
    assert slept > 1


def test_a_run_that_publishes_keeps_what_it_has_sent(folder: Path) -> None:
    storage = MemoryStorage()
    orphans(storage, folder)
    job, _ = Jobs(storage).submit(Jobs(run_of(storage).storage).spec(JOB))
    ended(Run(storage, job, "model"), "publishing")
    assert collect(storage) == []
    ended(Run(storage, job, "model"), "running")
    assert len(collect(storage)) > 3


def promoted(storage: Storage) -> bool:
    """Return True if the alias names the version; it must not name a deleted version."""
    registry = Registry(storage)
    if "production" not in registry.aliases("model"):
        return False
    return registry.resolve("model").version == 2


@pytest.mark.parametrize("named_before", [False, True])
def test_promoted_and_deleted_at_the_same_time(folder: Path, waiting: threading.Event, named_before: bool) -> None:
    base = MemoryStorage()
    for step in (1, 2):
        publish(base, folder, step)
    if named_before:
        Registry(base).promote("model", "production", 1, "")

    def promote(storage: Storage) -> bool:
        with suppress(ModelNotFound):
            Registry(storage).promote("model", "production", 2, "")
            return True
        return False

    def delete(storage: Storage) -> bool:
        with suppress(GenmodelsError):
            delete_version(Registry(storage), "model", 2)
            return True
        return False

    outcomes = set()
    for first, second in ((promote, delete), (delete, promote)):
        for moment in itertools.count(1):
            inner = MemoryStorage()
            inner.objects = dict(base.objects)
            concurrent = Concurrent(lambda inner=inner, second=second: second(inner), waiting)
            store = PausedStorage(inner, moment, concurrent)
            done = {first: first(store)}
            if store.operations < moment:
                assert moment > 4
                break
            done[second] = concurrent.join()
            assert done[promote] != done[delete] or not done[promote], (first, moment)
            assert promoted(inner) == done[promote], (first, moment)
            assert Registry(inner).versions("model") == ([1] if done[delete] else [1, 2])
            if named_before and not done[promote]:
                assert Registry(inner).resolve("model").version == 1
            outcomes.add((done[promote], done[delete]))
    assert {(True, False), (False, True)} <= outcomes


def test_moved_on_while_it_is_taken_back(folder: Path) -> None:
    inner = MemoryStorage()
    for step in (1, 2):
        publish(inner, folder, step)

    class Meanwhile(Wrapped):
        moved = False

        def after(self, verb: str, key: str) -> None:
            if verb == "put" and "/aliases/" in key and not self.moved:
                self.moved = True
                inner.delete("models/model/versions/00000002.json")
                Registry(inner).promote("model", "production", 1, "by a person")

    with pytest.raises(ModelNotFound):
        Registry(Meanwhile(inner)).promote("model", "production", 2, "")
    assert Registry(inner).resolve("model").version == 1


# ---- uploads in parts


def test_parts_of_an_upload_that_never_ended_are_removed_after_a_day(
    s3_storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list finds all, and each costs a list of its parts and a deletion; uploads of other programs stay."""
    inner: Any = s3_storage
    client, bucket, prefix = inner._storage._client, inner._storage._bucket, inner._storage._prefix
    operations: list[str] = []
    for key in ("models/m/blobs/b", "runs/j/m/w", "datasets/d/f", "backup/of-another-program"):
        target = {"Bucket": bucket, "Key": prefix + key}
        begun = client.create_multipart_upload(**target)["UploadId"]
        client.upload_part(**target, UploadId=begun, PartNumber=1, Body=b"x" * 100)
    s3_storage.put("datasets/d/f", b"another process has stored it meanwhile")
    assert [item for item in gc(s3_storage).items if item.upload] == [], "they may be in progress"
    monkeypatch.setattr(gc_module, "UPLOAD_SECONDS", -1.0)
    client.meta.events.register(
        "before-call.s3.*",
        lambda model, **_: operations.append(model.name) if "Upload" in model.name or "Parts" in model.name else None,
    )
    plan = gc(s3_storage)
    items = sorted((item.key, item.bytes, item.why) for item in plan.items if item.upload)
    why = "parts of an upload that never ended"
    assert items == [("datasets/d/f", 100, why), ("models/m/blobs/b", 100, why), ("runs/j/m/w", 100, why)]
    plan.carry_out()
    assert sorted(operations) == ["AbortMultipartUpload"] * 3 + ["ListMultipartUploads"] + ["ListParts"] * 4
    assert [item for item in gc(s3_storage).items if item.upload] == []
    (other,) = s3_storage.partial_uploads(-1.0)
    assert other.key == "backup/of-another-program"
    s3_storage.abort_upload(other)
    assert s3_storage.exists("datasets/d/f")
