"""Test what clean-up costs as runs add up, and that a clean-up of marked runs finds all that a full one finds."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import pytest

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import GenmodelsError, StorageUnavailable
from genmodels.registry.gc import gc
from genmodels.registry.removal import delete_model, delete_version
from genmodels.registry.store import Registry
from genmodels.runs.gc_marks import COMPLETE, read_marks
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import Change, Status
from genmodels.runs.store import Run
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage, write_document
from services.local.platform import submit
from tests.support.counting_storage import CountingStorage
from tests.support.storages import LINEAGE, MemoryStorage, PausedStorage, Wrapped, save

LONG_AGO = "2020-01-01T00:00:00.000+00:00"
BLOB = "a" * 64


def spec_of(model: str) -> JobSpec:
    entry = {"name": model, "model": {"family": "vae"}, "data": {"dataset": "digits"}}
    return parse_spec(json.dumps({"name": "shapes", "models": [entry]}).encode(), "spec")


def submitted(storage: Storage, model: str = "model") -> Run:
    job, _ = Jobs(storage).submit(spec_of(model))
    return Run(storage, job, model)


def train(run: Run, attempt: int = 1, saves: int = 3) -> None:
    """Save checkpoints after the newest one."""
    parent = next(reversed(run.checkpoints()), None)
    run.start_attempt(attempt, parent, 1)
    first = parent.step if parent else 0
    for step in range(first + 1, first + 1 + saves):
        save(run, attempt, step)


def end(run: Run) -> None:
    status = Status(state="succeeded", attempt=9, history=[Change(state="succeeded", time=LONG_AGO, reason="")])
    run.write_status(status, run.status()[1])
    Jobs(run.storage).close(run.job, LONG_AGO, {run.model: "succeeded"})


def ended(storage: Storage, model: str = "model") -> Run:
    run = submitted(storage, model)
    train(run)
    end(run)
    return run


def publish(run: Run, step: int, number: int = 1) -> None:
    """Write a version with one file, as a publisher does."""
    file = {"size": 1, "sha256": BLOB}
    run.storage.put(f"models/{run.model}/blobs/{BLOB}", b"x")
    body = {"model": run.model, "version": number, "family": "vae", "job": run.job, "gate": None, "metrics": {}}
    body |= {"checkpoint": {"attempt": 1, "step": step}, "lineage": LINEAGE.model_dump(), "created": LONG_AGO}
    write_document(run.storage, f"models/{run.model}/versions/{number:08d}.json", body | {"files": {"f": file}})


def is_clean(storage: Storage) -> bool:
    return gc(storage, everything=True).items == []


# ---- what it costs


@pytest.fixture(scope="module")
def cleaned() -> list[dict[str, bytes]]:
    """Return storages with 10 and 200 ended runs that were cleaned up."""
    return [_cleaned(many) for many in (10, 200)]


def _cleaned(many: int) -> dict[str, bytes]:
    storage = MemoryStorage()
    run = ended(storage, "model-0")
    publish(run, 3)
    for number in range(1, many):
        names = (run.job, f"shapes-{number:08x}"), (run.model, f"model-{number}")
        for key, data in list(storage.objects.items()):
            if "model-0" in key or run.job in key:
                for old, new in names:
                    key, data = key.replace(old, new), data.replace(old.encode(), new.encode())
                storage.put(key, data)
    plan = gc(storage)
    assert len(plan.items) == 2 * many
    plan.carry_out()
    return storage.objects


@pytest.fixture
def storages(cleaned: list[dict[str, bytes]]) -> list[CountingStorage]:
    storages = [CountingStorage() for _ in cleaned]
    for storage, objects in zip(storages, cleaned, strict=True):
        inner = storage.inner = MemoryStorage()
        inner.objects = dict(objects)
    return storages


def cost(storage: CountingStorage) -> Counter[str]:
    storage.forget()
    gc(storage).carry_out()
    return storage.counts.copy()


def test_a_second_clean_up_reads_nothing_of_ended_runs(storages: list[CountingStorage]) -> None:
    first, second = (cost(storage) for storage in storages)
    assert first == second
    assert sum(first.values()) <= 3, "the marks, whether they are complete, and the open jobs"


@pytest.mark.parametrize("change", ["a run ends", "a run is resumed", "a version is deleted", "nothing can be removed"])
def test_a_clean_up_costs_what_has_changed(storages: list[CountingStorage], change: str) -> None:
    def make(storage: CountingStorage) -> int:
        """Return the number of checkpoints to remove."""
        if change == "a run ends":
            ended(storage, "new")
            return 2
        if change == "nothing can be removed":
            run = submitted(storage, "new")
            train(run, saves=1)
            end(run)
            return 0
        (name,) = (key.split("/")[1] for key in storage.list("jobs/") if key == _first_spec(storage))
        run = Run(storage, name, "model-0")
        if change == "a version is deleted":
            train(run, 2, saves=1)  # now another checkpoint than the published one is the newest
            delete_version(Registry(storage), "model-0", 1)
            return 2  # the checkpoint, and the file of the version
        Jobs(storage).reopen(name)
        train(run, 2)
        end(run)
        return 2  # two of the new ones: the published one stays

    costs = []
    for storage in storages:
        expected = make(storage)
        assert len(gc(storage).items) == expected
        costs.append(cost(storage))
        assert is_clean(storage)
        assert sum(cost(storage).values()) <= 3
    assert costs[0] == costs[1]


def _first_spec(storage: Storage) -> str:
    """Return the key of the spec that trains model-0."""
    job = storage.list("models/model-0/runs/")[0].rpartition("/")[2].partition("-")[2]
    return f"jobs/{job}/spec.json"


def test_runs_that_are_open_cost_no_more_than_their_submission(storages: list[CountingStorage]) -> None:
    for storage in storages:
        train(submitted(storage, "model-0"))
    first, second = (cost(storage) for storage in storages)
    assert first == second
    assert len(read_marks(storages[0])) == 1


# ---- a storage of an earlier release


def test_the_first_clean_up_of_an_older_storage_reads_everything_and_marks_what_is_not_finished() -> None:
    storage = MemoryStorage()
    old, running, waiting = ended(storage, "old"), submitted(storage, "running"), submitted(storage, "waiting")
    train(running)
    for key in storage.list("gc/"):
        storage.delete(key)
    assert len(gc(storage).items) == len(gc(storage).items) == 2
    assert not storage.exists(COMPLETE), "a plan changes nothing"
    gc(storage).carry_out()
    assert storage.exists(COMPLETE)
    assert sorted(read_marks(storage)) == sorted([(running.job, "running"), (waiting.job, "waiting")])
    assert len(old.checkpoints()) == 1
    end(running)
    gc(storage).carry_out()
    assert len(running.checkpoints()) == 1
    assert is_clean(storage)


# ---- changes and kills at any moment


def resume_and_end(run: Run) -> None:
    Jobs(run.storage).reopen(run.job)
    train(run, 2)
    end(run)


def delete_its_version(run: Run) -> None:
    with suppress(GenmodelsError):
        delete_version(Registry(run.storage), run.model, 1)


def delete_its_model(run: Run) -> None:
    delete_model(run.storage, run.model)


def end_another(run: Run) -> None:
    ended(run.storage, "another")


def run_again_on_this_machine(run: Run) -> None:
    """`genmodels run` of the same file continues its run."""
    own = Run(run.storage, submit(run.storage, spec_of("own")), "own")
    train(own, len(own.started()) + 1)
    status = Status(state="succeeded", attempt=1, history=[Change(state="succeeded", time=LONG_AGO, reason="")])
    own.write_status(status, own.status()[1])


CHANGES = [resume_and_end, delete_its_version, delete_its_model, end_another, run_again_on_this_machine]


@pytest.mark.parametrize(
    ("change", "older"), [*((change, False) for change in CHANGES), (resume_and_end, True), (delete_its_version, True)]
)
def test_a_change_at_any_moment_of_a_clean_up_is_seen_by_it_or_by_the_next(
    change: Callable[[Run], None], older: bool
) -> None:
    for moment in itertools.count(1):
        inner = MemoryStorage()
        run = ended(inner)
        publish(run, 2)
        if not older:
            gc(inner).carry_out()
            run_again_on_this_machine(run)
        store = PausedStorage(inner, moment, lambda run=run: change(run))
        gc(store).carry_out()
        if store.operations < moment:
            return
        gc(inner).carry_out()
        assert is_clean(inner), moment


def test_a_clean_up_that_is_killed_at_any_moment_is_completed_by_the_next() -> None:
    class Cut(Wrapped):
        left = 0

        def before(self, verb: str, key: str) -> None:
            self.left -= 1
            if self.left < 0:
                raise StorageUnavailable(key)

    for moment in itertools.count(1):
        inner = MemoryStorage()
        runs = [ended(inner, f"model-{number}") for number in range(2)]
        publish(runs[0], 2)
        inner.put("models/model-0/blobs/" + "b" * 64, b"no version has it")
        store = Cut(inner)
        store.left = moment
        try:
            gc(store).carry_out()
        except StorageUnavailable:
            inner.delete("models/model-0/gc-lease.json")  # it has expired
            gc(inner).carry_out()
            assert is_clean(inner), moment
            assert [ref.step for ref in runs[0].checkpoints()] == [2, 3]
            assert not gc(inner).finished, "nothing is left to look at"
        else:
            assert moment > 20
            return


def test_a_damaged_run_is_looked_at_until_it_is_restored() -> None:
    storage = MemoryStorage()
    run = ended(storage)
    key = f"{run.checkpoint_prefix(CheckpointRef(attempt=1, step=1))}/manifest.json"
    manifest = storage.objects[key]
    storage.put(key, b"{")
    gc(storage).carry_out()
    assert len(read_marks(storage)) == 1
    storage.put(key, manifest)
    gc(storage).carry_out()
    assert not read_marks(storage)
    assert is_clean(storage)
