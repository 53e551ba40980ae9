"""Test the job service's list of models and `genmodels models`: what they show, and what they cost in storage."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from genmodels.errors import StorageUnavailable
from genmodels.keys import Keys
from genmodels.registry.catalogue import Catalogue
from services.cli.catalog import StorageCatalog
from services.console.tables import models_table
from services.jobs.fresh_catalogue import FreshCatalogue
from tests.support.asgi_client import refused
from tests.support.counting_storage import CountingStorage
from tests.support.job_service import Service
from tests.support.published_models import copy_model, publish
from tests.support.storages import FailingStorage, MemoryStorage


@pytest.fixture(scope="module")
def template() -> MemoryStorage:
    storage = MemoryStorage()
    publish(storage, "template", "vae")
    return storage


def listed(service: Service, query: str = "", **options: Any) -> dict[str, Any]:
    response = service("GET", f"/v1/models{query}", **options)
    assert response.status_code == 200, response.text
    return response.json()


def names(page: dict[str, Any]) -> list[str]:
    return [model["name"] for model in page["data"]]


@pytest.mark.parametrize("n", [10, 200])
def test_a_list_costs_one_read_of_the_head_whatever_the_number_of_models(template: MemoryStorage, n: int) -> None:
    storage = CountingStorage()
    copy_model(storage, template, *(f"model-{i:03d}" for i in range(n)))
    service = Service(storage)
    page = listed(service)
    assert names(page) == [f"model-{i:03d}" for i in range(n)]
    storage.forget()
    assert listed(service) == page
    assert storage.counts == {"get catalogue": 1}
    publish(storage, "model-007", "gan", step=2)
    storage.forget()
    assert listed(service)["data"][7]["versions"] == [1, 2]
    assert storage.counts == {"get catalogue": 2}, "the head and one shard"


@pytest.mark.parametrize("n", [10, 200])
def test_the_command_reads_the_catalogue_and_no_version(template: MemoryStorage, n: int) -> None:
    storage = CountingStorage()
    copy_model(storage, template, *(f"model-{i:03d}" for i in range(n)))
    Catalogue(storage).rebuild()
    storage.forget()
    models = StorageCatalog(storage).models()
    assert [model["name"] for model in models] == [f"model-{i:03d}" for i in range(n)]
    assert storage.counts.keys() == {"exists catalogue", "get catalogue"}
    assert storage.counts.total() <= 2 + 64, "the head and the shards"
    assert models_table(models).row_count == n


def test_pages_follow_each_other_and_a_key_sees_its_models(template: MemoryStorage) -> None:
    storage = MemoryStorage()
    copy_model(storage, template, *(f"{prefix}-{i}" for i in range(3) for prefix in ("mine", "other")))
    _, token = Keys(storage).create("me", ("submit",), prefixes=("mine-",))
    service = Service(storage, Keys(storage))
    headers = {"authorization": f"Bearer {token}"}
    page = listed(service, "?limit=2", headers=headers)
    assert (names(page), page["has_more"], page["last_id"]) == (["mine-0", "mine-1"], True, "mine-1")
    page = listed(service, "?limit=2&after=mine-1", headers=headers)
    assert (names(page), page["has_more"]) == (["mine-2"], False)
    assert refused(service("GET", "/v1/models?limit=1001", headers=headers), 400)["param"] == "limit"


def test_a_damaged_version_or_alias_is_named_and_harms_no_other(template: MemoryStorage) -> None:
    storage = MemoryStorage()
    copy_model(storage, template, "alias", "good", "version")
    storage.put("models/alias/aliases/production.json", b"")
    storage.put("models/version/versions/00000001.json", b"")
    alias, good, version = listed(Service(storage))["data"]
    assert "models/alias/aliases/production.json: damaged" in alias["problem"]
    assert "models/version/versions/00000001.json: damaged" in version["problem"]
    assert (version["family"], version["metrics"], version["created"]) == (None, {}, None)
    assert (good["family"], "problem" in good) == ("vae", False)


def test_while_storage_is_away_the_last_list_stays(template: MemoryStorage) -> None:
    storage = FailingStorage()
    copy_model(storage, template, "m")
    service, later = Service(storage), Service(storage)
    page = listed(service)
    storage.away = True
    assert listed(service) == page
    assert refused(later("GET", "/v1/models"), 503)["code"] == "storage_away"
    storage.away = False
    assert listed(later) == page


class Requests:
    """Act as a lock that counts the requests that have arrived, and as a reader whose first read waits for them."""

    def __init__(self, expected: int, error: Exception | None) -> None:
        self.lock, self.expected, self.error = threading.Lock(), expected, error
        self.arrived, self.begun, self.reads = threading.Semaphore(0), threading.Event(), 0

    def __enter__(self) -> None:
        self.arrived.release()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def refresh(self) -> set[str]:
        self.reads += 1
        self.begun.set()
        for _ in range(self.expected if self.reads == 1 else 0):
            assert self.arrived.acquire(timeout=30)
        if self.error:
            raise self.error
        return set()


@pytest.mark.parametrize("error", [None, StorageUnavailable("away")])
def test_requests_that_arrive_during_a_read_share_the_next(error: StorageUnavailable | None) -> None:
    catalogue: Any = FreshCatalogue(MemoryStorage())
    requests = catalogue._lock = catalogue._reader = Requests(6, error)
    with ThreadPoolExecutor(6) as threads:
        reads = [threads.submit(catalogue.read)]
        assert requests.begun.wait(30)
        reads += [threads.submit(catalogue.read) for _ in range(5)]
        outcomes = {read.exception(30) or read.result() for read in reads}
    assert outcomes == {error or requests}
    assert requests.reads == 2


def test_the_command_writes_nothing_to_an_empty_storage() -> None:
    storage = MemoryStorage()
    assert StorageCatalog(storage).models() == []
    assert not storage.objects
