"""Test that an alias, a model or a dataset is deleted completely, also when the process dies at any write."""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genmodels.data import added, uploads
from genmodels.data.sources import cache_folder
from genmodels.engine.alias_watcher import AliasWatcher
from genmodels.engine.model_cache import ModelCache
from genmodels.errors import DataError, GenmodelsError, JobNotFound, ModelNotFound
from genmodels.family import EvaluationResult
from genmodels.registry import references
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.removal import dataset_contents, delete_dataset, delete_model, model_contents
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.runs.job_index import index_runs
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import Change, State, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import dump, parse_spec
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage, lease, write_document
from genmodels.storage.documents import now
from genmodels.threads import Rounds
from tests.support.published_models import publish
from tests.support.run_parts import write_log
from tests.support.storages import LINEAGE, MemoryStorage, PausedStorage, Wrapped, save

LONG_AGO = "2020-01-01T00:00:00.000+00:00"
OWN = "own-00000000"  # a job of `genmodels run`
LINES = "What light through yonder window breaks?\n" * 80


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def spec(*models: str, dataset: str = "digits", **train: Any) -> JobSpec:
    entries = [
        {"name": model, "model": {"family": "vae"}, "data": {"dataset": dataset}, "train": train} for model in models
    ]
    document = json.dumps({"name": "shapes", "models": entries}).encode()
    return parse_spec(document, "spec", datasets={"photos": "image"})


def trained(storage: Storage, job: str, model: str, state: State = "succeeded") -> Run:
    """Write a run with checkpoints, samples and logs of two attempts."""
    run = Run(storage, job, model)
    run.start_attempt(1, None, 1)
    parent = save(run, 1, 1)
    run.start_attempt(2, parent, 1)
    save(run, 2, 2, parent)
    run.write_sample(2, 2, "samples.png", b"private")
    write_log(run, 2, "driver", 1, b"")
    change = Change(state=state, time=LONG_AGO, reason="")
    run.write_status(Status(state=state, attempt=2, history=[change]), run.status()[1])
    return run


def own_job(storage: Storage, *models: str, job: str = OWN, state: State = "succeeded", **options: Any) -> list[Run]:
    storage.put(f"jobs/{job}/spec.json", dump(spec(*models, **options)))
    index_runs(storage, job, list(models), now())
    return [trained(storage, job, model, state) for model in models]


def evaluated(storage: Storage, version: Version) -> None:
    Registry(storage).record_evaluation(version, EvaluationResult(), thorough=False, seconds=1, publication=True)


@pytest.fixture(scope="module")
def base() -> MemoryStorage:
    """Return two models from one job, each with two evaluated versions, and aliases."""
    storage = MemoryStorage()
    own_job(storage, "first", "second")
    for model in ("first", "second"):
        for step in (1, 2):
            evaluated(storage, publish(storage, model, "vae", step=step))
        Registry(storage).promote(model, "staging", 1, "test")
    return storage


def copy(storage: MemoryStorage) -> MemoryStorage:
    copied = MemoryStorage()
    copied.objects = dict(storage.objects)
    return copied


class Died(BaseException):
    pass


class Dying(Wrapped):
    """Act as a process that is killed before or after its n-th write or deletion."""

    def __init__(self, inner: Storage, moment: int, after: bool) -> None:
        super().__init__(inner)
        self.moment, self.is_after, self.writes = moment, after, 0

    def before(self, verb: str, key: str) -> None:
        self.writes += verb in ("put", "delete")
        self._maybe(verb, not self.is_after)

    def after(self, verb: str, key: str) -> None:
        self._maybe(verb, self.is_after)

    def _maybe(self, verb: str, now: bool) -> None:
        if now and verb in ("put", "delete") and self.writes == self.moment:
            self.moment = 0
            raise Died


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the leases of dead processes end at once."""
    monkeypatch.setattr("genmodels.registry.store.GC_SECONDS", 0.0)
    monkeypatch.setattr(uploads, "GC_SECONDS", 0.0)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set an event when a process waits for a lease."""
    event = threading.Event()

    def sleep(_: float) -> None:
        event.set()
        time.sleep(0.001)

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr(lease, "time", clock)
    return event


class Concurrent:
    """Run work in a thread; `begin` lets it continue until it is done or waits for a lease."""

    def __init__(self, work: Callable[[], Any], waits: threading.Event) -> None:
        self.work, self.waits, self.waited = work, waits, False
        self.threads = ThreadPoolExecutor(1)
        waits.clear()

    def begin(self) -> None:
        self.future = self.threads.submit(self.work)
        self.future.add_done_callback(lambda _: self.waits.set())
        assert self.waits.wait(30)
        self.waited = not self.future.done()

    def end(self) -> Any:
        self.threads.shutdown()
        return self.future.result()


def others(storage: MemoryStorage, what: str) -> dict[str, bytes]:
    """Return all objects except those of a model or a dataset, and except the catalogue, which is derived."""
    return {
        key: data
        for key, data in storage.objects.items()
        if f"/{what}/" not in key and not key.startswith("catalogue/")
    }


def traces(storage: MemoryStorage, what: str) -> list[str]:
    """Return what remains of it, except leases, claims, marks for clean-up, and numbers that are not reused."""
    result = [key for key in storage.objects if f"/{what}/" in key and not key.startswith("gc/")]
    result = [key for key in result if not re.search("/(deleted|published)/", key)]
    return [key for key in result if not key.endswith(("gc-lease.json", "status.json"))]


# ---- models


@pytest.mark.parametrize("with_runs", [False, True])
def test_a_model_is_removed_whole_and_no_other_is_touched(base: MemoryStorage, with_runs: bool) -> None:
    storage = copy(base)
    contents = delete_model(storage, "first", with_runs=with_runs)
    assert (contents.versions, contents.aliases, contents.jobs) == ([1, 2], {"production": 2, "staging": 1}, [OWN])
    assert contents.bytes > 1000
    assert others(storage, "first") == others(base, "first")
    keys = traces(storage, "first")
    if with_runs:
        assert keys == []
        assert Run(storage, OWN, "first").status()[0].state == "succeeded"
    else:
        assert {key.split("/")[0] for key in keys} == {"runs", "models"}
        assert all(key.startswith(("runs/", "models/first/runs/")) for key in keys)
    registry = Registry(storage)
    for name in ("first", "first@staging", "first@1", "first@2", "first@latest"):
        with pytest.raises(ModelNotFound):
            registry.resolve(name)
    with pytest.raises(ModelNotFound, match=r"no model 'first'|only the files of its runs in jobs own-00000000"):
        delete_model(storage, "first")
    if not with_runs:
        delete_model(storage, "first", with_runs=True)
        assert traces(storage, "first") == []


def test_the_storage_of_a_folder_and_of_s3_alike(storage: Storage) -> None:
    own_job(storage, "first")
    evaluated(storage, publish(storage, "first", "vae"))
    delete_model(storage, "first", with_runs=True)
    left = ["deleted/00000001", "gc-lease.json", "published/test-00000000.attempt-1.step-1.json"]
    assert storage.list("models/first/") == [f"models/first/{name}" for name in left]
    assert storage.list("runs/") == [f"runs/{OWN}/first/status.json"]


def test_a_number_is_not_given_again(base: MemoryStorage) -> None:
    storage = copy(base)
    delete_model(storage, "first", with_runs=True)
    assert publish(storage, "first", "vae", step=7).version == 3


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_the_rest_is_removed_by_the_next(
    base: MemoryStorage, after: bool, short_leases: None
) -> None:
    for moment in itertools.count(1):
        storage = copy(base)
        dying = Dying(storage, moment, after)
        try:
            delete_model(dying, "first", with_runs=True)
        except Died:
            pass
        else:
            assert moment > 25
            return
        assert others(storage, "first") == others(base, "first"), moment
        registry = Registry(storage)
        for name in registry.aliases("first"):  # every version that an alias still names is complete
            version = registry.resolve(f"first@{name}")
            assert all(storage.exists(key) for key in registry.keys(version).values()), moment
        for version in registry.all_versions("first"):
            assert all(storage.exists(key) for key in registry.keys(version).values()), moment
        for ref in Run(storage, OWN, "first").checkpoints():  # every checkpoint that the runs still show is complete
            prefix = Run(storage, OWN, "first").checkpoint_prefix(ref)
            files = Run(storage, OWN, "first").manifest(ref).files
            assert all(storage.exists(f"{prefix}/{name}") for name in files), moment
        with suppress(ModelNotFound):  # not found if the process died after the last write
            delete_model(storage, "first", with_runs=True)
        assert traces(storage, "first") == [], moment
        assert others(storage, "first") == others(base, "first"), moment


def test_published_and_promoted_at_any_moment(base: MemoryStorage, waits: threading.Event) -> None:
    """A new version is complete and served, or it is gone; an alias never names a missing version."""
    for moment in itertools.count(1):
        storage = copy(base)
        publishing = Concurrent(lambda storage=storage: publish(storage, "first", "vae", step=9), waits)
        paused = PausedStorage(storage, moment, publishing.begin)
        delete_model(paused, "first")
        if paused.operations < moment:
            assert moment > 20
            return
        with suppress(ModelNotFound):  # the version was deleted before the promotion
            publishing.end()
        registry = Registry(storage)
        for alias in registry.aliases("first"):
            assert registry.resolve(f"first@{alias}").checkpoint.step == 9, moment
        for version in registry.all_versions("first"):
            assert version.checkpoint.step == 9
            assert all(storage.exists(key) for key in registry.keys(version).values()), moment


@pytest.mark.parametrize("state", ["queued", "starting", "running", "publishing"])
def test_a_model_whose_run_is_open_stays(base: MemoryStorage, state: State) -> None:
    storage = copy(base)
    job, _ = Jobs(storage).submit(spec("first", "third"))
    Run(storage, job, "first").write_status(Status(state=state), None)
    before = dict(storage.objects)
    with pytest.raises(GenmodelsError, match=f"model 'first': job {job} trains it and has not ended; cancel it first"):
        delete_model(storage, "first")
    assert storage.objects == before
    delete_model(storage, "second")


def test_a_model_that_another_starts_from_stays(base: MemoryStorage) -> None:
    storage = copy(base)
    job, _ = Jobs(storage).submit(references.resolve_references(spec("third", init_from="first@1"), storage))
    with pytest.raises(GenmodelsError, match=f"job {job} starts from it and has not ended"):
        delete_model(storage, "first")


@pytest.mark.parametrize("state", ["starting", "running", "publishing"])
def test_a_run_of_this_machine_that_is_under_way_counts_as_well(state: State) -> None:
    storage = MemoryStorage()
    own_job(storage, "first", state=state)
    publish(storage, "first", "vae")
    with pytest.raises(GenmodelsError, match=f"job {OWN} trains it and has not ended; end its `genmodels run` first"):
        delete_model(storage, "first")
    with pytest.raises(GenmodelsError, match=f"job {OWN} has not ended; end its `genmodels run` first"):
        Jobs(storage).delete(OWN)


def test_half_submitted_and_damaged_jobs_stand_in_no_way(base: MemoryStorage) -> None:
    storage = copy(base)
    Jobs(storage).submit(spec("first"))
    (job,) = Jobs(storage).open()
    storage.put(f"jobs/{job}/spec.json", b"models: [{family: of tomorrow}]")
    delete_model(storage, "first")


@pytest.mark.parametrize("name", ["", "..", "../keys", "a/b", "First", "nothing"])
def test_names_of_nothing_are_told(name: str) -> None:
    storage = MemoryStorage()
    storage.put("keys/1.json", b"{}")
    for work in (model_contents, delete_model):
        with pytest.raises(ModelNotFound, match="no model"):
            work(storage, name)
    for look in (dataset_contents, delete_dataset):
        with pytest.raises(DataError, match=r"no dataset|dataset name"):
            look(storage, name)
    assert list(storage.objects) == ["keys/1.json"]


def test_a_built_in_dataset_cannot_be_deleted() -> None:
    for look in (dataset_contents, delete_dataset):
        with pytest.raises(DataError, match="'digits' is a built-in dataset; only added datasets can be deleted"):
            look(MemoryStorage(), "digits")


def test_a_served_model_that_is_deleted_is_gone_at_the_next_look(base: MemoryStorage) -> None:
    storage = copy(base)
    with ThreadPoolExecutor(1) as loaders:
        cache = ModelCache(storage, 2**30, lambda model: None, loaders)
        rounds = Rounds("alias-watcher", logging.getLogger("test"))
        watcher = AliasWatcher(storage, CatalogueReader(storage), cache, rounds)
        watcher.refresh()
        first, second = watcher.resolve("first"), watcher.resolve("second")
        for name, resolved in (("first", first), ("second", second)):
            cache.load(resolved).result()
            watcher.loaded(name, resolved)
    assert first.version == 2
    delete_model(storage, "first", with_runs=True)
    watcher.refresh()
    for name in ("first", "first@staging", "first@2", "first@live"):
        with pytest.raises(ModelNotFound):
            watcher.resolve(name)
    assert watcher.resolve("second") == second
    assert {resolved.model for resolved in watcher.serving()} == {"second"}


# ---- aliases


def test_an_alias_is_removed_and_its_version_stays(storage: Storage) -> None:
    registry = Registry(storage)
    publish(storage, "first", "vae")
    registry.remove_alias("first", "production")
    assert registry.aliases("first") == {}
    assert registry.versions("first") == [1]
    with pytest.raises(ModelNotFound, match="has no alias 'production'"):
        registry.remove_alias("first", "production")
    registry.promote("first", "production", 1, "again")
    assert registry.resolve("first").version == 1


# ---- jobs of `genmodels run`


def test_a_job_of_this_machine_is_removed_with_what_its_runs_left() -> None:
    storage = MemoryStorage()
    own_job(storage, "first", "second")
    own_job(storage, "first", job="other-00000000")
    Jobs(storage).delete(OWN)
    assert [key for key in storage.objects if OWN in key] == []
    assert references.find_checkpoint("first@step-2", storage)[0].job == "other-00000000"
    with pytest.raises(JobNotFound):
        Jobs(storage).delete(OWN)


@pytest.mark.parametrize("after", [False, True])
def test_a_job_of_this_machine_killed_at_any_write(after: bool) -> None:
    for moment in itertools.count(1):
        storage = MemoryStorage()
        own_job(storage, "first")
        try:
            Jobs(Dying(storage, moment, after)).delete(OWN)
        except Died:
            if storage.exists(f"jobs/{OWN}/spec.json"):
                Jobs(storage).delete(OWN)
            assert [key for key in storage.objects if OWN in key] == [], moment
        else:
            assert moment > 8
            return


# ---- datasets


def text(folder: Path, content: str = LINES) -> Path:
    path = folder / "lines.txt"
    path.write_text(content)
    return path


def photos(storage: Storage, folder: Path) -> uploads.StoredDataset:
    """Write two contents under one name, one of them used in training, and the data that evaluations cached of it."""
    first, _ = uploads.add(storage, "photos", text(folder))
    second, _ = uploads.add(storage, "photos", text(folder, LINES.upper()), replace=True)
    for dataset in (first, second):
        storage.put(f"evaluation-cache/ngrams-3-{dataset.digest[:16]}", b"counts")
        assert uploads.load("photos", dataset.sha256, storage).digest == dataset.digest
    storage.put("evaluation-cache/ngrams-3-ffffffffffffffff", b"of others")
    return first


def test_a_dataset_is_removed_whole_and_says_what_was_trained_on_it(storage: Storage, tmp_path: Path) -> None:
    first = photos(storage, tmp_path)
    uploads.add(storage, "others", text(tmp_path, LINES.lower()))
    own_job(storage, "first", dataset="photos")
    own_job(storage, "second", job="second-00000000")
    for job, model in ((OWN, "first"), ("second-00000000", "second")):
        version = publish(storage, model, "vae").model_copy(update={"job": job, "lineage": LINEAGE})
        write_document(storage, f"models/{model}/versions/00000001.json", version.model_dump(mode="json"))
    assert len(list((cache_folder() / "datasets").glob("[0-9a-f]*"))) == 2
    contents = delete_dataset(storage, "photos")
    assert (contents.runs, contents.versions) == ([f"{OWN}/first"], ["first@1"])
    assert len(contents.contents) == 2
    assert first.sha256 in contents.contents
    assert contents.bytes > 2 * len(LINES)
    assert storage.list("datasets/photos/") == ["datasets/photos/gc-lease.json"]
    assert storage.list("evaluation-cache/") == ["evaluation-cache/ngrams-3-ffffffffffffffff"]
    assert list((cache_folder() / "datasets").glob("[0-9a-f]*")) == []
    assert [dataset.name for dataset in added.catalog(storage)] == ["others"]
    assert Registry(storage).resolve("first").lineage == LINEAGE
    with pytest.raises(DataError, match="no dataset 'photos'"):
        delete_dataset(storage, "photos")
    again, new = uploads.add(storage, "photos", text(tmp_path))
    assert new
    assert uploads.load("photos", None, storage).digest == again.digest


def test_of_two_deletions_of_a_dataset_at_once_the_second_finds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    photos(storage, tmp_path)

    def overtaken(*names: Any) -> Any:
        contents = dataset_contents(*names)
        monkeypatch.setattr("genmodels.registry.removal.dataset_contents", dataset_contents)
        delete_dataset(storage, "photos")
        return contents

    monkeypatch.setattr("genmodels.registry.removal.dataset_contents", overtaken)
    with pytest.raises(DataError, match="no dataset 'photos'"):
        delete_dataset(storage, "photos")


@pytest.mark.parametrize("after", [False, True])
def test_a_dataset_killed_at_any_write(tmp_path: Path, after: bool, short_leases: None) -> None:
    for moment in itertools.count(1):
        storage = MemoryStorage()
        photos(storage, tmp_path)
        try:
            delete_dataset(Dying(storage, moment, after), "photos")
        except Died:
            pass
        else:
            assert moment > 7
            return
        for dataset in uploads.contents(storage, "photos"):  # every dataset that is still listed is complete
            assert storage.exists(dataset.key), moment
        if traces(storage, "photos"):
            delete_dataset(storage, "photos")
        assert traces(storage, "photos") == [], moment
        assert storage.list("evaluation-cache/") == ["evaluation-cache/ngrams-3-ffffffffffffffff"], moment


@pytest.mark.parametrize("content", [LINES, LINES.upper(), LINES.lower()])
def test_added_at_any_moment_of_its_deletion(tmp_path: Path, content: str, waits: threading.Event) -> None:
    """Either it is added before the deletion and is deleted too, or it is added after the deletion and is complete."""
    outcomes = set()
    for moment in itertools.count(1):
        storage = MemoryStorage()
        photos(storage, tmp_path)
        path = text(tmp_path, content)
        adding = Concurrent(
            lambda storage=storage, path=path: uploads.add(storage, "photos", path, replace=True), waits
        )
        paused = PausedStorage(storage, moment, adding.begin)
        delete_dataset(paused, "photos")
        if paused.operations < moment:
            assert outcomes == {True, False}
            return
        dataset, _ = adding.end()
        is_there = bool(traces(storage, "photos"))
        outcomes.add(is_there)
        if is_there:
            assert uploads.find(storage, "photos") == dataset, moment
            assert storage.get(dataset.key)[0] == content.encode(), moment
        assert is_there or not adding.waited, moment


def test_a_dataset_that_an_open_job_needs_stays(tmp_path: Path) -> None:
    storage = MemoryStorage()
    photos(storage, tmp_path)
    job, _ = Jobs(storage).submit(spec("first", dataset="photos"))
    with pytest.raises(GenmodelsError, match=f"job {job} needs dataset 'photos' and has not ended; cancel it first"):
        delete_dataset(storage, "photos")
    assert len(uploads.contents(storage, "photos")) == 2
