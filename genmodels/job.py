"""A job's objects in storage: its spec, the index of open and ended jobs, and the inbox of the dispatcher.

    idempotency/<sha256 of caller and key>.json     job id and digest of the body; put-if-absent, first
    open/<job>                                      index: put before the spec, gone when every run has ended
    ended/<time>-<job>                              index; the time counts backwards, so that a listing begins with the newest
    models/<model>/runs/<time>-<job>                which jobs train a model
    jobs/<job>/spec.yaml                            put-if-absent, last: from then on the job exists
    dispatcher/nudges/<job>/<model>                 "look at this run's wishes": one listing instead of one for each run
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from genmodels.checkpoint import Document
from genmodels.errors import Conflict, GenmodelsError, IdempotencyConflict, JobNotFound, KeyNotFound
from genmodels.run import Run, State, now
from genmodels.spec import JobSpec, digest, dump, load_stored
from genmodels.storage import Storage, read_document, write_document

JOB_ID = r"[a-z0-9]([a-z0-9-]{0,70}[a-z0-9])?"
END_OF_TIME = 10**13  # milliseconds; times count down from here
NUDGES = "dispatcher/nudges/"
READ_AT_ONCE = 8


class Entry(Document):
    """A job in the index."""

    job: str
    name: str
    priority: int
    submitted: str
    caller: str  # id of the key it came with; "" without keys
    models: list[str]


class EndedEntry(Entry):
    ended: str
    states: dict[str, State]


class _Idempotency(Document):
    job: str
    digest: str
    submitted: str


class Jobs:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def submit(
        self, spec: JobSpec, *, caller: str = "", idempotency_key: str | None = None, body_digest: str | None = None
    ) -> tuple[str, bool]:
        """Make a job of a spec; its id, and whether it is new.

        Args:
            idempotency_key: the same key of the same caller gives the same job, however often and from how many places
                it comes; whoever comes second brings to its end what the first left undone.
            body_digest: of the body as it was sent; the spec's digest if left out.

        Raises:
            IdempotencyConflict: the key came before with another body.
        """
        job, submitted = f"{spec.name}-{secrets.token_hex(4)}", now()
        if idempotency_key is not None:
            mine = _Idempotency(job=job, digest=body_digest or digest(spec), submitted=submitted)
            first = self._first(caller, idempotency_key, mine)
            job, submitted = first.job, first.submitted
            if self.exists(job):
                return job, False
        entry = Entry(
            job=job,
            name=spec.name,
            priority=spec.priority,
            submitted=submitted,
            caller=caller,
            models=[model.name for model in spec.models],
        )
        self._put(f"open/{job}", entry)
        for model in spec.models:
            self.storage.put(f"models/{model.name}/runs/{_countdown(submitted)}-{job}", b"")
        try:
            self.storage.put(f"jobs/{job}/spec.yaml", dump(spec), if_absent=True)
        except Conflict:
            # Our own write whose answer was lost, or somebody else with the same key, who was quicker.
            return job, idempotency_key is None
        return job, True

    def exists(self, job: str) -> bool:
        return re.fullmatch(JOB_ID, job) is not None and self.storage.exists(f"jobs/{job}/spec.yaml")

    def spec(self, job: str) -> JobSpec:
        """Raises JobNotFound."""
        try:
            return load_stored(self.storage.get(f"jobs/{_checked(job)}/spec.yaml")[0])
        except KeyNotFound:
            raise JobNotFound(f"no job {job!r}; `genmodels jobs` lists what there is") from None

    # The index

    def entry(self, job: str) -> Entry | EndedEntry:
        """Raises JobNotFound."""
        try:
            return Entry.model_validate(read_document(self.storage, f"open/{_checked(job)}")[0])
        except KeyNotFound:
            pass
        key = self._ended_key(job)
        if key is None:
            raise JobNotFound(f"no job {job!r}; `genmodels jobs` lists what there is")
        return EndedEntry.model_validate(read_document(self.storage, key)[0])

    def open(self) -> list[str]:
        """Ids of the jobs that have not ended."""
        return [key.removeprefix("open/") for key in self.storage.list("open/")]

    def ended(self, after: str = "", limit: int = 20) -> list[tuple[str, EndedEntry]]:
        """Ended jobs, the newest first, each with a cursor to go on after."""
        keys = self.storage.list("ended/", after=f"ended/{after}" if after else "", limit=limit)
        with ThreadPoolExecutor(READ_AT_ONCE) as threads:
            found = threads.map(self._read_ended, keys)
            return [(key.removeprefix("ended/"), entry) for key, entry in zip(keys, found, strict=True) if entry]

    def close(self, job: str, ended: str, states: Mapping[str, State]) -> None:
        """Move a job whose runs have all ended to the ended ones; doing it twice changes nothing."""
        try:
            entry = Entry.model_validate(read_document(self.storage, f"open/{job}")[0])
        except KeyNotFound:
            return
        closed = EndedEntry(**entry.model_dump(), ended=ended, states=dict(states))
        self._put(f"ended/{_countdown(ended)}-{job}", closed)
        self.storage.delete(f"open/{job}")

    def reopen(self, job: str) -> None:
        """Put an ended job back among the open ones, for a run of it that is to be resumed."""
        entry = self.entry(job)
        if not isinstance(entry, EndedEntry):
            return
        self._put(f"open/{job}", Entry(**entry.model_dump(include=set(Entry.model_fields))))
        self.storage.delete(f"ended/{_countdown(entry.ended)}-{job}")

    def delete(self, job: str) -> None:
        """Remove an ended job and all that its runs left; versions that were published from it stay.

        Raises:
            JobNotFound: there is none.
            GenmodelsError: it has not ended.
        """
        entry = self.entry(job)
        if not isinstance(entry, EndedEntry):
            raise GenmodelsError(f"job {job} has not ended: cancel it first")
        for model in entry.models:
            self.storage.delete(f"models/{model}/runs/{_countdown(entry.submitted)}-{job}")
        for prefix in (f"runs/{job}/", f"jobs/{job}/"):
            for key in self.storage.list(prefix):
                self.storage.delete(key)
        self.storage.delete(f"ended/{_countdown(entry.ended)}-{job}")  # last, so that a second try finds it

    # The inbox

    def nudge(self, job: str, model: str) -> None:
        """Have the dispatcher look at a run's wishes; leave the wish first."""
        self.storage.put(f"{NUDGES}{job}/{model}", b"")

    def nudged(self) -> list[tuple[str, str]]:
        names = (key.removeprefix(NUDGES).split("/") for key in self.storage.list(NUDGES))
        return [(name[0], name[1]) for name in names if len(name) == 2]

    def take_nudge(self, job: str, model: str) -> None:
        self.storage.delete(f"{NUDGES}{job}/{model}")

    def _first(self, caller: str, key: str, mine: _Idempotency) -> _Idempotency:
        """What the first one that came with this key left."""
        name = f"idempotency/{hashlib.sha256(json.dumps([caller, key]).encode()).hexdigest()}.json"
        try:
            write_document(self.storage, name, mine.model_dump(mode="json"), if_absent=True)
            return mine
        except Conflict:
            first = _Idempotency.model_validate(read_document(self.storage, name)[0])
        if first.digest != mine.digest:
            raise IdempotencyConflict(f"this idempotency key was used for job {first.job}, with another body")
        return first

    def _ended_key(self, job: str) -> str | None:
        """Where an ended job stands in the index: at the time of its runs' last change."""
        try:
            models = [model.name for model in self.spec(job).models]
        except JobNotFound:
            return None
        histories = [Run(self.storage, job, model).status()[0].history for model in models]
        times = [history[-1].time for history in histories if history]
        key = f"ended/{_countdown(max(times))}-{job}" if times else ""
        if key and self.storage.exists(key):
            return key
        return next((key for key in self.storage.list("ended/") if key.endswith(f"-{job}")), None)

    def _read_ended(self, key: str) -> EndedEntry | None:
        try:
            return EndedEntry.model_validate(read_document(self.storage, key)[0])
        except KeyNotFound:  # it was resumed or deleted just now
            return None

    def _put(self, key: str, entry: Entry) -> None:
        write_document(self.storage, key, entry.model_dump(mode="json"))


def newest_run(storage: Storage, model: str) -> str | None:
    """The job that was submitted last of those that train a model."""
    prefix = f"models/{model}/runs/"
    newest = storage.list(prefix, limit=1)
    return newest[0].removeprefix(prefix).partition("-")[2] if newest else None


def _countdown(time: str) -> str:
    return f"{END_OF_TIME - round(datetime.fromisoformat(time).timestamp() * 1000):013d}"


def _checked(job: str) -> str:
    if not re.fullmatch(JOB_ID, job):
        raise JobNotFound(f"no job {job[:80]!r}: ids are lower-case letters, digits and dashes")
    return job
