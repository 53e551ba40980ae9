"""Test jobs in storage: created once, listed, ended, resumed and deleted, also when a process dies in between."""

from __future__ import annotations

import itertools
import json
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from genmodels.errors import GenmodelsError, IdempotencyConflict, JobNotFound, SpecError, StorageUnavailable
from genmodels.runs.job_index import index_runs, newest_run
from genmodels.runs.jobs import EndedEntry, Entry, Jobs
from genmodels.runs.queue import delete_notification, notifications, notify
from genmodels.runs.store import Run
from genmodels.spec.parse import digest, dump, parse_spec
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage
from tests.support.run_parts import write_metrics
from tests.support.storages import FailingStorage, MemoryStorage, PausedStorage, RecordingStorage, Wrapped, in_threads

SUBMITTED = "2026-03-01T12:00:00.000+00:00"
ENDED = "2026-03-01T13:00:00.000+00:00"
LATER = "2026-03-01T14:00:00.000+00:00"
BAD_IDS = ["", ".", "..", "../x", "a/b", "A", "a_b", "-a", "a-", "a\n", "a" * 73, "é", "a\x00", "a" * 10**6]


class Died(BaseException):
    """Stand in for the death of a process."""


class CountingStorage(Wrapped):
    def __init__(self, inner: Storage | None = None) -> None:
        super().__init__(inner)
        self.count: Counter[str] = Counter()

    def before(self, verb: str, key: str) -> None:
        self.count[verb] += 1


class LosingStorage(Wrapped):
    """Execute the n-th put, but lose its answer."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self.lost, self.puts = lost, 0

    def after(self, verb: str, key: str) -> None:
        if verb == "put":
            self.puts += 1
            if self.puts == self.lost:
                raise StorageUnavailable(f"{key}: answer lost")


class DyingStorage(Wrapped):
    """Let the process die right before or right after the n-th change."""

    def __init__(self, inner: Storage, change: int, before: bool) -> None:
        super().__init__(inner)
        self.change, self.dies_before, self.changes = change, before, 0

    def before(self, verb: str, key: str) -> None:
        if verb in ("put", "delete"):
            self.changes += 1
            if self.dies_before and self.changes == self.change:
                raise Died

    def after(self, verb: str, key: str) -> None:
        if not self.dies_before and verb in ("put", "delete") and self.changes == self.change:
            raise Died


def spec(name: str = "shapes", *models: str, priority: int = 0) -> JobSpec:
    common = {"model": {"family": "vae"}, "data": {"dataset": "digits"}}
    entries = [{"name": model, **common} for model in models or ("vae-digits",)]
    return parse_spec(json.dumps({"name": name, "priority": priority, "models": entries}).encode(), "spec")


SPEC = spec()


def end(storage: Storage, job: str, ended: str = ENDED) -> None:
    Jobs(storage).close(job, ended, dict.fromkeys(Jobs(storage).entry(job).models, "succeeded"))


def each_death(make: Callable[[], Storage], work: Callable[[Storage], Any]) -> Iterator[Storage]:
    """Yield the store that remains when a process dies before or after each of its changes."""
    for moment in itertools.count():
        store = make()
        try:
            work(DyingStorage(store, change=moment // 2 + 1, before=moment % 2 == 0))
        except Died:
            yield store
        else:
            assert moment > 5  # the process did die
            return


# ---- submit


def test_a_job_is_made(storage: Storage) -> None:
    jobs = Jobs(storage)
    made = spec("shapes", "vae-a", "vae-b", priority=7)
    job, new = jobs.submit(made, caller="0123abcd")
    assert new
    assert job.rpartition("-")[0] == "shapes"
    assert len(job) == len("shapes-") + 8
    assert jobs.exists(job)
    assert jobs.spec(job) == made
    assert jobs.open() == [job]
    entry = jobs.entry(job)
    assert type(entry) is Entry
    assert (entry.job, entry.name, entry.priority, entry.caller) == (job, "shapes", 7, "0123abcd")
    assert entry.models == ["vae-a", "vae-b"]
    assert newest_run(storage, "vae-a") == newest_run(storage, "vae-b") == job
    assert jobs.ended() == []
    again, new = jobs.submit(made, caller="0123abcd")
    assert new
    assert again != job


def test_the_spec_comes_last_and_the_index_before_it() -> None:
    store = RecordingStorage()
    job, _ = Jobs(store).submit(spec("shapes", "a", "b"), idempotency_key="k")
    folders = [key.split("/")[0] for key, _ in store.log]
    assert folders == ["idempotency", "open", "models", "models", "gc", "gc", "jobs"]
    assert store.log[-1] == (f"jobs/{job}/spec.json", dump(spec("shapes", "a", "b")))


def test_an_idempotency_key_gives_one_job(storage: Storage) -> None:
    jobs = Jobs(storage)
    job, new = jobs.submit(SPEC, caller="me", idempotency_key="k", body_digest="d")
    assert new
    assert jobs.submit(SPEC, caller="me", idempotency_key="k", body_digest="d") == (job, False)
    other, new = jobs.submit(SPEC, caller="you", idempotency_key="k", body_digest="d")
    assert new
    assert other != job
    third, new = jobs.submit(SPEC, caller="me", idempotency_key="other", body_digest="d")
    assert new
    assert len({job, other, third}) == 3
    for body in ("e", None):
        with pytest.raises(IdempotencyConflict, match=f"{job}, with another body"):
            jobs.submit(SPEC, caller="me", idempotency_key="k", body_digest=body)
    assert sorted(jobs.open()) == sorted([job, other, third])


def test_without_a_digest_the_spec_counts() -> None:
    jobs = Jobs(MemoryStorage())
    job, _ = jobs.submit(SPEC, idempotency_key="k")
    assert jobs.submit(SPEC, idempotency_key="k", body_digest=digest(SPEC)) == (job, False)
    with pytest.raises(IdempotencyConflict):
        jobs.submit(spec(priority=1), idempotency_key="k")


def test_callers_and_keys_are_not_mixed_up() -> None:
    jobs = Jobs(MemoryStorage())
    ids = {jobs.submit(SPEC, caller=a, idempotency_key=b)[0] for a, b in [("a", "bc"), ("ab", "c"), ('a","b', "c")]}
    assert len(ids) == 3


def test_a_hundred_at_once_with_one_key(storage: Storage) -> None:
    answers = in_threads(100, lambda _: Jobs(storage).submit(SPEC, idempotency_key="k", body_digest="d"))
    assert sorted(new for _, new in answers) == [False] * 99 + [True]
    (job,) = {job for job, _ in answers}
    assert Jobs(storage).open() == [job]
    assert storage.list("jobs/") == [f"jobs/{job}/spec.json"]
    assert len(storage.list("models/vae-digits/runs/")) == 1


@pytest.mark.parametrize("lost", range(1, 5))
def test_a_hundred_at_once_and_an_answer_is_lost(lost: int) -> None:
    store = LosingStorage(lost)

    def patient(_: int) -> str:
        while True:
            try:
                return Jobs(store).submit(SPEC, idempotency_key="k", body_digest="d")[0]
            except StorageUnavailable:
                continue

    (job,) = set(in_threads(100, patient))
    assert Jobs(store).open() == [job]
    assert store.list("jobs/") == [f"jobs/{job}/spec.json"]


@pytest.mark.parametrize("lost", range(1, 5))
def test_a_single_submission_whose_answer_is_lost(lost: int) -> None:
    store = LosingStorage(lost)
    try:
        job, new = Jobs(store).submit(SPEC, idempotency_key="k", body_digest="d")
        assert new
    except StorageUnavailable:  # the client tries again
        job, _ = Jobs(store).submit(SPEC, idempotency_key="k", body_digest="d")
    assert Jobs(store).submit(SPEC, idempotency_key="k", body_digest="d") == (job, False)
    assert store.list("jobs/") == [f"jobs/{job}/spec.json"]


def test_a_second_submission_completes_one_that_died() -> None:
    def submit(store: Storage) -> tuple[str, bool]:
        return Jobs(store).submit(SPEC, idempotency_key="k", body_digest="d")

    deaths = 0
    for store in each_death(MemoryStorage, submit):
        begun = store.list("idempotency/") != []
        existed = store.list("jobs/") != []
        job, new = submit(store)
        assert new is not begun
        assert Jobs(store).open() == [job]
        assert Jobs(store).spec(job) == SPEC
        assert newest_run(store, "vae-digits") == job
        assert len(store.list("models/")) == 1
        if existed:
            assert store.list("jobs/") == [f"jobs/{job}/spec.json"]
        assert submit(store) == (job, False)
        deaths += 1
    assert deaths == 10  # before and after each of five writes


def test_a_submission_that_never_ended_is_no_job() -> None:
    inner = MemoryStorage()
    with pytest.raises(Died):
        Jobs(DyingStorage(inner, 3, before=True)).submit(SPEC)
    jobs = Jobs(inner)
    (job,) = jobs.open()
    assert not jobs.exists(job)
    with pytest.raises(JobNotFound):
        jobs.spec(job)
    assert newest_run(inner, "vae-digits") is None


def test_clean_up_takes_a_submission_for_a_dead_one() -> None:
    store = Wrapped()

    def sweep(verb: str, key: str) -> None:
        if verb == "put" and key.startswith("jobs/"):
            for open_job in store.inner.list("open/"):
                store.inner.delete(open_job)

    store.before = sweep
    job, _ = Jobs(store).submit(SPEC)
    assert Jobs(store).open() == [job]


def test_a_taken_id_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(MemoryStorage())
    ids = iter(["aaaaaaaa", "aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr(secrets, "token_hex", lambda n: next(ids) if n == 4 else "0" * 32)
    first, _ = jobs.submit(SPEC)
    end(jobs.storage, first)
    second, _ = jobs.submit(SPEC)
    assert (first, second) == ("shapes-aaaaaaaa", "shapes-bbbbbbbb")


def test_the_store_is_away() -> None:
    store = FailingStorage()
    jobs = Jobs(store)
    job, _ = jobs.submit(SPEC, idempotency_key="k")
    store.away = True
    for ask in (
        lambda: jobs.submit(SPEC),
        lambda: jobs.spec(job),
        lambda: jobs.entry(job),
        lambda: jobs.exists(job),
        jobs.open,
        jobs.ended,
        lambda: notifications(jobs.storage),
        lambda: jobs.reopen(job),
        lambda: jobs.close(job, ENDED, {"vae-digits": "failed"}),
        lambda: jobs.delete(job),
    ):
        with pytest.raises(StorageUnavailable):
            ask()
    store.away = False
    assert jobs.submit(SPEC, idempotency_key="k") == (job, False)
    assert jobs.open() == [job]


@pytest.mark.parametrize("job", BAD_IDS)
def test_an_invalid_id_never_reaches_the_store(job: str) -> None:
    store = CountingStorage()
    jobs = Jobs(store)
    assert not jobs.exists(job)
    for ask in (jobs.spec, jobs.entry, jobs.reopen, jobs.delete):
        with pytest.raises(JobNotFound) as raised:
            ask(job)
        assert len(str(raised.value)) < 600
    assert store.count == {}


def test_there_is_no_such_job(storage: Storage) -> None:
    jobs = Jobs(storage)
    for ask in (jobs.spec, jobs.entry, jobs.reopen, jobs.delete):
        with pytest.raises(JobNotFound, match="no job 'shapes-00000000'"):
            ask("shapes-00000000")
    jobs.close("shapes-00000000", ENDED, {})
    assert storage.list("") == []


# ---- the index


def test_a_job_ends_and_is_resumed(storage: Storage) -> None:
    jobs = Jobs(storage)
    job, _ = jobs.submit(spec("shapes", "vae-a", "vae-b"), caller="me")
    before = jobs.entry(job)
    for _ in range(2):  # the second time changes nothing
        jobs.close(job, ENDED, {"vae-a": "succeeded", "vae-b": "failed"})
        assert jobs.open() == []
        entry = jobs.entry(job)
        assert entry == EndedEntry(**before.model_dump(), ended=ENDED, states={"vae-a": "succeeded", "vae-b": "failed"})
        assert [ended for _, ended in jobs.ended()] == [entry]
    for _ in range(2):
        jobs.reopen(job)
        assert jobs.open() == [job]
        assert jobs.entry(job) == before
        assert jobs.ended() == []
    jobs.close(job, LATER, {"vae-a": "succeeded", "vae-b": "succeeded"})
    assert [(entry.ended, entry.states["vae-b"]) for _, entry in jobs.ended()] == [(LATER, "succeeded")]
    assert jobs.spec(job).models[1].name == "vae-b"


def test_pages_of_ended_jobs(storage: Storage) -> None:
    jobs = Jobs(storage)
    made = [jobs.submit(SPEC)[0] for _ in range(7)]
    for i, job in enumerate(made):
        end(storage, job, f"2026-03-0{i + 1}T12:00:00.000+00:00")
    listed: list[str] = []
    cursor, pages = "", []
    while page := jobs.ended(cursor, limit=3):
        cursor = page[-1][0]
        pages.append(len(page))
        listed += [entry.job for _, entry in page]
    assert listed == made[::-1]
    assert pages == [3, 3, 1]


@pytest.mark.parametrize("cursor", ["x", "../x", "1" * 13, "1" * 13 + "-", "1" * 12 + "-a", "é", "\x00", "a" * 10**5])
def test_cursors_are_checked(cursor: str) -> None:
    store = CountingStorage()
    with pytest.raises(SpecError, match="after: got"):
        Jobs(store).ended(cursor)
    assert store.count == {}


def test_an_entry_is_deleted_while_a_page_is_read() -> None:
    store = Wrapped()
    jobs = Jobs(store)
    made = [jobs.submit(SPEC)[0] for _ in range(3)]
    for i, job in enumerate(made):
        end(store, job, f"2026-03-0{i + 1}T12:00:00.000+00:00")
    gone = store.list("ended/")[1]

    def reopened(verb: str, key: str) -> None:
        if verb == "list":
            store.inner.delete(gone)

    store.after = reopened
    assert [entry.job for _, entry in jobs.ended()] == [made[2], made[0]]


def each_state() -> list[tuple[str, Callable[[Storage], Any], Callable[[Storage], Any]]]:
    """Return (name, function that prepares the store, what a dispatcher or a person does then)."""
    job = "shapes-00000000"

    def made(store: Storage) -> None:
        entry = Entry(job=job, name="shapes", priority=0, submitted=SUBMITTED, caller="", models=["vae-digits"])
        Jobs(store)._put(f"open/{job}", entry)
        store.put(f"jobs/{job}/spec.json", dump(SPEC))

    def ended(store: Storage) -> None:
        made(store)
        end(store, job)

    def resumed(store: Storage) -> None:
        ended(store)
        Jobs(store).reopen(job)

    return [
        ("close", made, lambda store: end(store, job)),
        ("reopen", ended, lambda store: Jobs(store).reopen(job)),
        ("close again", resumed, lambda store: end(store, job, LATER)),
    ]


@pytest.mark.parametrize(("what", "before", "work"), each_state(), ids=["close", "reopen", "close again"])
def test_death_in_the_index_loses_no_job(
    what: str, before: Callable[[Storage], Any], work: Callable[[Storage], Any]
) -> None:
    """After a death at any point the job is in an index; a second try leaves it in the right index, once."""

    def make() -> Storage:
        store = MemoryStorage()
        before(store)
        return store

    for store in each_death(make, work):
        jobs = Jobs(store)
        (job,) = set(jobs.open()) | {entry.job for _, entry in jobs.ended()}
        assert jobs.entry(job).job == job
        work(store)
        is_open, is_ended = jobs.open(), [entry.ended for _, entry in jobs.ended()]
        if what == "reopen":
            assert (is_open, is_ended) == ([job], [])
        else:
            assert (is_open, is_ended) == ([], [LATER if what == "close again" else ENDED])
        # a later resume and end leave no second entry
        jobs.reopen(job)
        end(store, job, "2026-03-02T00:00:00.000+00:00")
        assert len(store.list("ended/")) == 1
        assert jobs.open() == []


def test_a_stale_dispatcher_never_hides_a_running_job() -> None:
    """A dispatcher is paused while it closes a job, and wakes after another has closed it and a user has resumed it."""
    for moment in itertools.count(2):  # before point 2 it has read nothing: there the lease must protect
        inner = MemoryStorage()
        job, _ = Jobs(inner).submit(SPEC)

        def meanwhile(inner: Storage = inner, job: str = job) -> None:
            end(inner, job)
            Jobs(inner).reopen(job)

        store = PausedStorage(inner, moment, meanwhile)
        Jobs(store).close(job, ENDED, {"vae-digits": "failed"})
        if store.operations < moment:
            assert moment > 6
            return
        assert Jobs(inner).open() == [job], moment
        assert Jobs(inner).ended() == [], moment


def test_closed_while_it_is_reopened() -> None:
    """A resume is paused at any point; the dispatcher finds no command and closes the job again."""
    outcomes = []
    for moment in itertools.count(1):
        inner = MemoryStorage()
        job, _ = Jobs(inner).submit(SPEC)
        end(inner, job)
        store = PausedStorage(inner, moment, lambda inner=inner, job=job: end(inner, job))
        Jobs(store).reopen(job)
        if store.operations < moment:
            break
        is_open, is_ended = Jobs(inner).open(), [entry.job for _, entry in Jobs(inner).ended()]
        assert (is_open, is_ended) in [([job], []), ([], [job])], moment
        assert isinstance(Jobs(inner).entry(job), EndedEntry) == bool(is_ended)
        outcomes.append(bool(is_open))
    assert outcomes == [True, True, True, True, False, False]


def test_resumed_by_many_at_once(storage: Storage) -> None:
    jobs = Jobs(storage)
    job, _ = jobs.submit(SPEC)
    end(storage, job)
    assert in_threads(8, lambda _: jobs.reopen(job)) == [None] * 8
    assert jobs.open() == [job]
    assert jobs.ended() == []


# ---- delete


def test_delete(storage: Storage) -> None:
    jobs = Jobs(storage)
    job, _ = jobs.submit(SPEC, idempotency_key="k")
    kept, _ = jobs.submit(SPEC)
    run = Run(storage, job, "vae-digits")
    write_metrics(run, 1, [{"step": 1}])
    run.write_status(run.status()[0].to("succeeded", "done"), None)
    storage.put("models/vae-digits/versions/00000001.json", b"{}")
    with pytest.raises(GenmodelsError, match="has not ended; cancel it first"):
        jobs.delete(job)
    end(storage, job)
    jobs.delete(job)
    assert [key for key in storage.list("") if job in key and not key.startswith("gc/")] == []
    assert storage.exists("models/vae-digits/versions/00000001.json")
    assert not jobs.exists(job)
    for ask in (jobs.entry, jobs.spec, jobs.reopen, jobs.delete):
        with pytest.raises(JobNotFound):
            ask(job)
    assert jobs.open() == [kept]
    assert newest_run(storage, "vae-digits") == kept
    with pytest.raises(IdempotencyConflict, match="was deleted"):
        jobs.submit(SPEC, idempotency_key="k")
    assert jobs.open() == [kept]


def test_a_second_delete_completes_one_that_died() -> None:
    job = ""

    def make() -> Storage:
        nonlocal job
        store = MemoryStorage()
        job, _ = Jobs(store).submit(SPEC, idempotency_key="k")
        write_metrics(Run(store, job, "vae-digits"), 1, [{"step": 1}])
        end(store, job)
        return store

    for store in each_death(make, lambda store: Jobs(store).delete(job)):
        if store.list(f"jobs/{job}/"):  # except after the last change
            Jobs(store).delete(job)
        assert [key for key in store.list("") if not key.startswith(("idempotency/", "gc/"))] == []


def test_a_job_that_is_resumed_is_not_deleted() -> None:
    inner = MemoryStorage()
    job, _ = Jobs(inner).submit(SPEC)
    end(inner, job)
    store = Wrapped(inner)

    def resumed(verb: str, key: str) -> None:
        if verb == "put" and key == f"jobs/{job}/index.json":
            Jobs(inner).reopen(job)

    store.before = resumed
    with pytest.raises(GenmodelsError, match="was resumed just now"):
        Jobs(store).delete(job)
    assert Jobs(inner).open() == [job]
    assert Jobs(inner).spec(job) == SPEC


# ---- the inbox, and which job is the newest


def test_notifications(storage: Storage) -> None:
    jobs = Jobs(storage)
    assert notifications(jobs.storage) == []
    for job, model in [("b-1", "m"), ("a-1", "m2"), ("a-1", "m")]:
        notify(jobs.storage, job, model)
    first = sorted(notifications(jobs.storage))
    assert [notification[:2] for notification in first] == [("a-1", "m"), ("a-1", "m2"), ("b-1", "m")]
    delete_notification(jobs.storage, *first[0])
    delete_notification(jobs.storage, *first[0])
    assert sorted(notifications(jobs.storage)) == first[1:]
    notify(jobs.storage, "b-1", "m")
    delete_notification(jobs.storage, *first[2])
    (later,) = [notification for notification in notifications(jobs.storage) if notification[0] == "b-1"]
    assert later != first[2], "who takes one late takes no later one with it"


def test_the_newest_run_of_a_model(storage: Storage) -> None:
    assert newest_run(storage, "vae-digits") is None
    for i in range(12):
        job = f"shapes-0000000{i:x}"
        index_runs(storage, job, ["vae-digits", "gan"], f"2026-03-01T12:00:00.{i:03}+00:00")
        if i < 2:
            storage.put(f"jobs/{job}/spec.json", dump(SPEC))
    assert newest_run(storage, "vae-digits") == newest_run(storage, "gan") == "shapes-00000001"  # other jobs failed
    assert newest_run(storage, "vae") is None


# ---- many


def test_ten_thousand_ended_jobs_slow_nothing() -> None:
    inner = MemoryStorage()
    for i in range(10_000):
        job, time = f"old-{i:08x}", f"2026-01-{i % 28 + 1:02}T{i // 28 % 24:02}:{i // 700:02}:00.000+00:00"
        entry = {"job": job, "name": "old", "priority": 0, "submitted": time, "caller": "", "models": ["vae-digits"]}
        ended = {**entry, "ended": time, "states": {"vae-digits": "succeeded"}}
        count = f"{10**13 - round(datetime.fromisoformat(time).timestamp() * 1000)}-{job}"
        inner.objects |= {
            f"ended/{count}": json.dumps(ended).encode(),
            f"jobs/{job}/spec.json": b"",
            f"models/vae-digits/runs/{count}": b"",
        }
    store = CountingStorage(inner)
    jobs = Jobs(store)

    def operations(work: Callable[[], Any]) -> dict[str, int]:
        store.count.clear()
        work()
        return dict(store.count)

    assert operations(lambda: jobs.submit(SPEC, idempotency_key="k")) == {"exists": 2, "put": 5}
    assert operations(lambda: jobs.submit(SPEC, idempotency_key="k")) == {"exists": 2, "put": 1, "get": 2}
    (job,) = jobs.open()
    assert operations(jobs.open) == {"list": 1}
    assert operations(lambda: jobs.ended(limit=20)) == {"list": 1, "get": 20}
    assert operations(lambda: jobs.entry(job)) == {"get": 1}
    assert operations(lambda: end(inner, job)) == {}
    assert operations(lambda: jobs.entry(job)) == {"get": 2}
    assert operations(lambda: jobs.reopen(job)) == {"get": 2, "put": 3, "delete": 1}
    assert operations(lambda: jobs.close(job, LATER, {})) == {"get": 3, "put": 2, "delete": 2}
    assert operations(lambda: newest_run(store, "vae-digits")) == {"list": 1, "exists": 1}
    assert jobs.ended(limit=1)[0][1].job == job


def test_a_page_of_ten_thousand_is_one_request(s3_storage: Storage) -> None:
    """Check the requests to the real server: the first page is one listing with that number of keys."""
    for i in range(40):
        s3_storage.put(f"ended/{i:013}-j", b"{}")
    requests: list[dict[str, Any]] = []

    def record(params: dict[str, Any], **_: Any) -> None:
        requests.append(dict(params))

    client = s3_storage._storage._client  # type: ignore[attr-defined]
    client.meta.events.register("before-parameter-build.s3.ListObjectsV2", record)
    assert len(s3_storage.list("ended/", after=f"ended/{4:013}-j", limit=20)) == 20
    assert [params["MaxKeys"] for params in requests] == [20]


def test_threads_share_one_object() -> None:
    jobs, lock, made = Jobs(MemoryStorage()), threading.Lock(), []

    def work(i: int) -> None:
        job, _ = jobs.submit(SPEC)
        with lock:
            made.append(job)
        if i % 2:
            end(jobs.storage, job)

    assert in_threads(16, work) == [None] * 16
    assert len(jobs.open()) == len(jobs.ended()) == 8
    assert sorted(made) == sorted(jobs.open() + [entry.job for _, entry in jobs.ended()])
