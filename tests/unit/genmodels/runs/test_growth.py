"""Test that lists of jobs and checks of specs cost the same, however many jobs and datasets there ever were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from genmodels.data import added, uploads
from genmodels.errors import GenmodelsError, SpecError
from genmodels.registry.references import resolve_references
from genmodels.registry.removal import dataset_contents, delete_dataset
from genmodels.runs.dataset_users import COMPLETE
from genmodels.runs.job_index import index_job, newest_run, spec_key
from genmodels.runs.jobs import Jobs
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage
from services.http.auth import Caller
from services.jobs.operations import JobOperations
from tests.support.counting_storage import CountingStorage
from tests.support.storages import MemoryStorage

PLAY = "To be, or not to be, that is the question. " * 100
SIZES = (10, 200)


def body(dataset: str, name: str = "a-model") -> bytes:
    return f"""
name: job
models:
  - name: {name}
    model: {{family: minigpt, n_layer: 1, n_embd: 8, n_head: 1, block_size: 16}}
    data: {{dataset: {dataset}}}
    train: {{max_steps: 1, batch_size: 4}}
""".encode()


def add(storage: Storage, folder: Path, name: str) -> None:
    path = folder / f"{name}.txt"
    path.write_text(PLAY + name)
    uploads.add(storage, name, path)


def spec(storage: Storage, dataset: str, name: str = "a-model") -> JobSpec:
    return resolve_references(parse_spec(body(dataset, name), "spec", datasets=added.Kinds(storage)), storage)


def end(storage: Storage, job: str, second: int) -> None:
    Jobs(storage).close(job, f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}+00:00", {})


def cost(storage: CountingStorage, work: Callable[[], object]) -> Counter[str]:
    storage.forget()
    work()
    return storage.counts.copy()


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Return storages with 10 and 200 added datasets, and so many ended jobs of one model on one of them."""
    return [_crowded(many, tmp_path_factory.mktemp("texts")) for many in SIZES]


def _crowded(many: int, folder: Path) -> dict[str, bytes]:
    storage = MemoryStorage()
    for name in ("mine", "other"):
        add(storage, folder, name)
    other = spec(storage, "other")
    for number in range(many):
        for key in storage.list("datasets/other/"):
            storage.put(key.replace("other", f"other-{number}"), storage.objects[key])
        job, _ = Jobs(storage).submit(other)
        end(storage, job, number)
    return storage.objects


@pytest.fixture
def crowded(objects: list[dict[str, bytes]]) -> list[CountingStorage]:
    storages = [CountingStorage() for _ in objects]
    for storage, content in zip(storages, objects, strict=True):
        storage.inner = MemoryStorage()
        storage.inner.objects = dict(content)
    return storages


def same(counts: list[Counter[str]]) -> Counter[str]:
    """Return the cost, which must be the same at both sizes."""
    assert counts[0] == counts[1]
    return counts[0]


def test_the_check_of_a_spec_reads_the_named_dataset_alone(crowded: list[CountingStorage]) -> None:
    def check(storage: CountingStorage) -> Counter[str]:
        operations = JobOperations(storage)
        return cost(storage, lambda: operations.dry_run(body("mine"), Caller(None), lambda: False))

    counts = same([check(storage) for storage in crowded])
    assert not [name for name in counts if name.startswith(("list", "folders", "sizes"))]


def test_a_wrong_name_is_answered_with_the_names_there_are(crowded: list[CountingStorage]) -> None:
    storage = crowded[0]
    with pytest.raises(SpecError, match="unknown dataset 'othr', did you mean other"):
        parse_spec(body("othr"), "spec", datasets=added.Kinds(storage))
    with pytest.raises(SpecError, match="unknown dataset 'mine'"):
        parse_spec(body("mine"), "spec", datasets=added.Kinds(storage, lambda name: name != "mine"))


def test_the_removal_of_a_dataset_reads_its_own_users(crowded: list[CountingStorage]) -> None:
    def remove(storage: CountingStorage) -> Counter[str]:
        job, _ = Jobs(storage).submit(spec(storage, "mine"))
        contents = dataset_contents(storage, "mine")  # the first call on a storage indexes jobs of an earlier release
        assert contents.runs == [f"{job}/a-model"]
        with pytest.raises(GenmodelsError, match="has not ended"):
            delete_dataset(storage, "mine")
        end(storage, job, 5000)
        return cost(storage, lambda: delete_dataset(storage, "mine"))

    same([remove(storage) for storage in crowded])


def test_the_newest_run_costs_the_same(crowded: list[CountingStorage]) -> None:
    jobs = [Jobs(storage).submit(spec(storage, "mine"))[0] for storage in crowded]
    assert [newest_run(storage, "a-model") for storage in crowded] == jobs
    same([cost(storage, partial(newest_run, storage, "a-model")) for storage in crowded])


def test_a_page_of_jobs_costs_the_same(crowded: list[CountingStorage]) -> None:
    pages = []
    for storage in crowded:
        job, _ = Jobs(storage).submit(spec(storage, "mine"))
        page = partial(JobOperations(storage).views.page, "all", 5, may_see=lambda models: True)
        first = page(after="")
        assert (first.data[0].job, len(first.data)) == (job, 5)
        pages.append([cost(storage, partial(page, after=after)) for after in ("", first.next or "")])
    assert pages[0] == pages[1]


def test_jobs_of_an_earlier_release_are_indexed_once(tmp_path: Path) -> None:
    storage = CountingStorage()
    add(storage, tmp_path, "mine")
    job, _ = Jobs(storage).submit(spec(storage, "mine"))
    for number in range(20):
        Jobs(storage).submit(spec(storage, "tiny-shakespeare", f"m-{number}"))
    for key in storage.list("dataset-users/"):
        storage.delete(key)
    first = cost(storage, lambda: dataset_contents(storage, "mine"))
    second = cost(storage, lambda: dataset_contents(storage, "mine"))
    assert (first["get jobs"], second["get jobs"]) == (22, 1)
    assert dataset_contents(storage, "mine").runs == [f"{job}/a-model"]


def test_a_deleted_job_uses_no_dataset(tmp_path: Path) -> None:
    storage = CountingStorage()
    add(storage, tmp_path, "mine")
    job, _ = Jobs(storage).submit(spec(storage, "mine"))
    end(storage, job, 0)
    index_job(storage, "half-submitted", spec(storage, "mine"), "2026-01-01T00:00:00+00:00")
    assert dataset_contents(storage, "mine").runs == [f"{job}/a-model"]
    Jobs(storage).delete(job)
    assert not storage.exists(spec_key(job))
    assert storage.list("dataset-users/") == [COMPLETE, "dataset-users/mine/half-submitted"]
    assert dataset_contents(storage, "mine").runs == []
