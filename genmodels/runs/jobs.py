"""Read and write a job's objects: its spec, and the index of open and ended jobs; `job_index.py` has other indexes.

idempotency/<sha256 of caller and key>.json     job id and digest of the body; put-if-absent, first
open/<job>                                      index: put before the spec, gone when every run has ended
ended/<time>-<job>                              index; the time counts down, so a listing begins with the newest
jobs/<job>/spec.json                            put-if-absent, last: from then on the job exists
jobs/<job>/index.json                           its place in the index, from its first end on; compare-and-swap
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

from pydantic import Field

from genmodels.errors import (
    Conflict,
    DamagedObject,
    GenmodelsError,
    IdempotencyConflict,
    JobNotFound,
    KeyNotFound,
    SpecError,
)
from genmodels.runs.gc_marks import mark
from genmodels.runs.job_index import JOB_ID, TIMED_NAME, countdown, index_job, run_keys, spec_key, user_keys
from genmodels.runs.records import ACTIVE, State
from genmodels.runs.store import Run
from genmodels.spec.names import LABEL
from genmodels.spec.parse import digest, dump, load_stored
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Document, Storage, Time, list_names, load_document, write_document
from genmodels.storage.documents import damaged, now

JobId = Annotated[str, Field(pattern=f"^{JOB_ID}$")]
ModelName = Annotated[str, Field(pattern=LABEL)]
CURSOR = r"\d{13}-\d{1,6}"
AT_ONCE = 8  # requests to the store


class StoredSpec(Document):
    """A job's spec. Its body is a `JobSpec`: see `Jobs.spec`."""

    object_kind = "spec"
    remedy = "restore it from a backup; without one, delete jobs/, open/ and runs/ of that job and submit it again"


class Entry(Document):
    """A job in the index."""

    object_kind = "index"
    remedy = "restore it from a backup; without one, delete it and submit the job again"

    job: JobId
    name: str
    priority: int
    submitted: Time
    caller: str  # id of the submitter's key; "" without keys
    models: list[ModelName]
    idempotency: str = Field("", pattern="^([0-9a-f]{64})?$")  # name of its object under idempotency/


class EndedEntry(Entry):
    ended: Time
    states: dict[str, State]


class Submission(Document):
    """The job that the first request with an idempotency key makes."""

    object_kind = "submission"
    remedy = "submit with another Idempotency-Key, or delete it"

    job: JobId
    digest: str
    submitted: Time
    deleted: bool = False  # the job was deleted; its key makes no other job


class Index(Document):
    """The index (open or ended) of a job that has ended at least once; the entries of both follow from it."""

    object_kind = "index"
    remedy = "restore it from a backup, or delete it: the job's end is then written anew"

    entry: EndedEntry
    state: Literal["ended", "open", "deleted"]


class Jobs:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def submit(
        self, spec: JobSpec, *, caller: str = "", idempotency_key: str | None = None, body_digest: str | None = None
    ) -> tuple[str, bool]:
        """Make a job of a spec; return its id, and True if this call was the first with its key.

        Args:
            idempotency_key: the same key of the same caller gives the same job, for any number of calls and processes;
                a second call completes what the first left undone.
            body_digest: of the body as it was sent; default: the spec's digest.

        Raises:
            IdempotencyConflict: the key was used with another body, or its job was deleted.
            StorageUnavailable: the job may or may not exist now; a call with the same key completes it.
        """
        first = mine = Submission(job=self._new_id(spec.name), digest=body_digest or digest(spec), submitted=now())
        name = ""
        if idempotency_key is not None:
            name = hashlib.sha256(json.dumps([caller, idempotency_key]).encode()).hexdigest()
            first = self._first(name, mine)
            if first is not mine and self.exists(first.job):
                return first.job, False
        entry = Entry(
            job=first.job,
            name=spec.name,
            priority=spec.priority,
            submitted=first.submitted,
            caller=caller,
            models=[model.name for model in spec.models],
            idempotency=name,
        )
        self._put(_open_key(entry.job), entry)
        index_job(self.storage, entry.job, spec, entry.submitted)
        mark(self.storage, entry.job, entry.models)  # clean-up leaves an open job alone, and keeps its marks
        with contextlib.suppress(Conflict):  # our own write, whose answer was lost, or another's with the same key
            self.storage.put(spec_key(entry.job), dump(spec), if_absent=True)
        if not self.storage.exists(_open_key(entry.job)):  # clean-up took this for a submission that never ended
            self._put(_open_key(entry.job), entry)
        return entry.job, first is mine

    def is_known(self, job: str) -> bool:
        """Return True if the job exists, or parts of it remain after an interrupted deletion."""
        return self.exists(job) or (re.fullmatch(JOB_ID, job) is not None and self.storage.exists(_index_key(job)))

    def exists(self, job: str) -> bool:
        return re.fullmatch(JOB_ID, job) is not None and self.storage.exists(spec_key(job))

    def spec(self, job: str) -> JobSpec:
        """Return the spec as it was submitted. Raises JobNotFound or DamagedObject."""
        key = spec_key(_checked(job))
        try:
            data, etag = self.storage.get(key)
        except KeyNotFound:
            raise _not_found(job) from None
        try:
            return load_stored(data)
        except SpecError as error:
            raise damaged(key, error.problems[0], StoredSpec, etag) from None

    def model_spec(self, job: str, model: str) -> ModelSpec:
        """Return the spec of one model of a job. Raises JobNotFound or DamagedObject."""
        return self.spec(job).model(model)

    # The index

    def entry(self, job: str) -> Entry | EndedEntry:
        """Return a job's entry in the index; the entry may be there just before the job exists.

        Raises:
            JobNotFound
            DamagedObject
        """
        if entry := self._open_entry(_checked(job)):
            return entry
        index, _ = self._index(job)
        if index is None or index.state == "deleted":
            raise _not_found(job)
        return index.entry if index.state == "ended" else _opened(index.entry)

    def open(self) -> list[str]:
        """Return the ids of the jobs that have not ended, possibly also of jobs that do not exist yet."""
        return list_names(self.storage, "open/", JOB_ID)

    def ended(self, after: str = "", limit: int = 20) -> list[tuple[str, EndedEntry]]:
        """Return ended jobs that can be read, the newest first, each with a cursor to continue after.

        A cursor names no job, because its reader may not see all jobs: it is a time, and the number of earlier jobs
        that ended in the same millisecond.
        """
        if after and not re.fullmatch(CURSOR, after):
            raise SpecError(f"after: got {after[:100]!r}, expected the `next` of the page before")
        time, _, count = after.partition("-")
        start, skipped, in_millisecond = f"{time}-" if time else "", int(count or 0), Counter({time: int(count or 0)})
        entries: list[tuple[str, EndedEntry]] = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            while len(entries) < limit:
                page_size = limit - len(entries) + skipped
                names = list_names(self.storage, "ended/", TIMED_NAME, after=start, limit=page_size)
                for name, entry in zip(names[skipped:], threads.map(self._read_ended, names[skipped:]), strict=True):
                    time = name.partition("-")[0]
                    in_millisecond[time] += 1
                    if entry:
                        entries.append((f"{time}-{in_millisecond[time]}", entry))
                if len(names) < page_size:
                    break
                start, skipped = names[-1], 0
        return entries

    def close(self, job: str, ended: str, states: Mapping[str, State]) -> None:
        """Move a job whose runs have all ended to the ended ones. A second call with the same `ended` changes nothing.

        A running job must always be in the open index. A process that was paused in this method while the job was
        resumed undoes its own change: its swap fails, or it sees after its deletion that the job is open again.
        """
        before, etag = self._index(job)
        entry = self._open_entry(job)
        if entry is None or (before and before.state == "deleted"):
            return
        closed = EndedEntry(**entry.model_dump(), ended=ended, states=dict(states))
        self._put(_ended_key(closed), closed)
        if before and _ended_key(before.entry) != _ended_key(closed):
            self.storage.delete(_ended_key(before.entry))  # left by a process that died while it reopened the job
        try:
            self._swap(Index(entry=closed, state="ended"), etag)
        except Conflict:
            current, _ = self._index(job)
            if current is None or current.state != "ended" or current.entry.ended != ended:
                self.storage.delete(_ended_key(closed))
            return
        self.storage.delete(_open_key(job))
        current, _ = self._index(job)
        if current and current.state == "open":  # resumed while this process was paused before the deletion
            self._put(_open_key(job), entry)

    def reopen(self, job: str) -> None:
        """Move an ended job back to the open ones, so that a run of it can be resumed. Raises JobNotFound."""
        while True:
            index, etag = self._index(_checked(job))
            if index is None and self._open_entry(job):
                return
            if index is None or index.state == "deleted":
                raise _not_found(job)
            self._put(_open_key(job), _opened(index.entry))
            mark(self.storage, job, index.entry.models)
            if index.state == "ended":
                try:
                    self._swap(index.model_copy(update={"state": "open"}), etag)
                except Conflict:
                    continue  # it was reopened, closed or deleted just now
            self.storage.delete(_ended_key(index.entry))
            current, _ = self._index(job)
            if current and current.state == "ended":  # closed while this process was paused before the deletion
                self._put(_ended_key(current.entry), current.entry)
            return

    def forget(self, job: str) -> None:
        """Remove an incomplete submission from the index, unless it is completed meanwhile."""
        entry = self._open_entry(job)
        if entry is None or self.exists(job):
            return
        self.storage.delete(_open_key(job))
        if self.exists(job):
            self._put(_open_key(job), entry)

    def delete(self, job: str) -> None:
        """Remove an ended job and everything its runs have stored; versions that were published from it stay.

        Raises:
            JobNotFound: there is no such job.
            GenmodelsError: the job has not ended.
        """
        index, etag = self._index(_checked(job))
        if index is None and self.exists(job) and self._open_entry(job) is None:
            self._delete_own(job)
            return
        if index is None or index.state == "open":
            self.entry(job)
            raise GenmodelsError(f"job {job} has not ended; cancel it first")
        if index.state == "ended":
            try:
                self._swap(index.model_copy(update={"state": "deleted"}), etag)
            except Conflict:
                raise GenmodelsError(f"job {job} was resumed just now; cancel it first") from None
        entry = index.entry
        if entry.idempotency:
            body = Submission(job=job, digest="", submitted=entry.submitted, deleted=True)
            write_document(self.storage, _submission_key(entry.idempotency), body.model_dump(mode="json"))
        listed = [
            *run_keys(job, entry.models, entry.submitted),
            *self._user_keys(job),
            _ended_key(entry),
            _open_key(job),
        ]
        self.storage.delete(spec_key(job))
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(self.storage.delete, [*listed, *self.storage.list(f"runs/{job}/")]))
        self.storage.delete(_index_key(job))  # last, so that a second call can complete the deletion

    def _delete_own(self, job: str) -> None:
        """Remove a job of `genmodels run`, which is in no index."""
        spec = self.spec(job)
        models = [model.name for model in spec.models]
        for model in models:
            if Run(self.storage, job, model).status()[0].state in ACTIVE:
                raise GenmodelsError(f"job {job} has not ended; end its `genmodels run` first")
        listed = [key for model in models for key in self.storage.list(f"models/{model}/runs/")]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            own = [key for key in listed if key.partition("/runs/")[2].partition("-")[2] == job]
            own += user_keys(job, spec)
            list(threads.map(self.storage.delete, [*own, *self.storage.list(f"runs/{job}/")]))
        self.storage.delete(spec_key(job))  # last, so that a second call can complete the deletion

    def _user_keys(self, job: str) -> list[str]:
        with contextlib.suppress(JobNotFound, DamagedObject):  # an entry that stays names no job
            return user_keys(job, self.spec(job))
        return []

    def _new_id(self, name: str) -> str:
        while True:
            job = f"{name}-{secrets.token_hex(4)}"
            if not self.exists(job):
                return job

    def _first(self, name: str, mine: Submission) -> Submission:
        """Return the first submission with this key; `mine` itself if it is the first."""
        key = _submission_key(name)
        try:
            write_document(self.storage, key, mine.model_dump(mode="json"), if_absent=True)
            return mine
        except Conflict:
            first, _ = load_document(self.storage, key, Submission)
        if first.deleted:
            raise IdempotencyConflict(f"this idempotency key was used for job {first.job}, which was deleted")
        if first.digest != mine.digest:
            raise IdempotencyConflict(f"this idempotency key was used for job {first.job}, with another body")
        return first

    def _open_entry(self, job: str) -> Entry | None:
        try:
            return load_document(self.storage, _open_key(job), Entry, job=job)[0]
        except KeyNotFound:
            return None

    def _read_ended(self, name: str) -> EndedEntry | None:
        with contextlib.suppress(KeyNotFound, DamagedObject):  # KeyNotFound: it was resumed or deleted just now
            return load_document(self.storage, f"ended/{name}", EndedEntry, job=name.partition("-")[2])[0]
        return None

    def _index(self, job: str) -> tuple[Index | None, str | None]:
        try:
            index, etag = load_document(self.storage, _index_key(job), Index)
        except KeyNotFound:
            return None, None
        if index.entry.job != job:
            raise damaged(_index_key(job), "it is a copy of another job's", Index, etag)
        return index, etag

    def _swap(self, index: Index, etag: str | None) -> None:
        key, body = _index_key(index.entry.job), index.model_dump(mode="json")
        write_document(self.storage, key, body, if_absent=etag is None, if_match=etag)

    def _put(self, key: str, entry: Entry) -> None:
        write_document(self.storage, key, entry.model_dump(mode="json"))


def _index_key(job: str) -> str:
    return f"jobs/{job}/index.json"


def _open_key(job: str) -> str:
    return f"open/{job}"


def _ended_key(entry: EndedEntry) -> str:
    return f"ended/{countdown(entry.ended)}-{entry.job}"


def _submission_key(name: str) -> str:
    return f"idempotency/{name}.json"


def _opened(entry: EndedEntry) -> Entry:
    return Entry(**entry.model_dump(include=set(Entry.model_fields)))


def _checked(job: str) -> str:
    if not re.fullmatch(JOB_ID, job):
        raise JobNotFound(f"no job {job[:80]!r}: ids are lower-case letters, digits and dashes")
    return job


def _not_found(job: str) -> JobNotFound:
    return JobNotFound(f"no job {job!r}; `genmodels jobs` lists all jobs")
