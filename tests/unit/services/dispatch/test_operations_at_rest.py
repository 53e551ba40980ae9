"""Test what a job service at rest costs in storage operations, whatever the number of models and ended jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from genmodels.registry.catalogue_keeper import LOOK_SECONDS, SWEEP_SECONDS, CatalogueKeeper
from genmodels.storage import Storage
from genmodels.storage.lease import Lease
from services.dispatch.dispatcher import REST_SECONDS, Dispatcher
from tests.support.counting_storage import CountingStorage
from tests.support.published_models import publish
from tests.support.scripted_cluster import Cluster
from tests.support.storages import MemoryStorage

REST = 600  # seconds


class Clock(threading.Event):
    """An event that is set after some time; to wait takes no time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.left = seconds

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= timeout or 0
        return self.left <= 0


@pytest.fixture(scope="module")
def models() -> Callable[[Storage, int], None]:
    template = MemoryStorage()
    publish(template, "template", "vae")

    def fill(storage: Storage, count: int) -> None:
        for key, data in template.objects.items():
            if key.startswith("models/") and "/published/" not in key:
                for i in range(count):
                    model = f"model-{i}"
                    storage.put(key.replace("template", model), data.replace(b'"template"', f'"{model}"'.encode()))

    return fill


@pytest.mark.parametrize("n", [10, 200])
def test_a_job_service_at_rest_costs_two_operations_a_second(models: Callable[[Storage, int], None], n: int) -> None:
    storage = CountingStorage()
    models(storage, n)
    keeper, dispatcher = CatalogueKeeper(storage), Dispatcher(storage, Cluster(storage), Lease(storage))
    lease_term = dispatcher.lease.try_acquire()
    assert lease_term is not None
    keeper.look()
    dispatcher.dispatch_once(lease_term)
    storage.forget()
    keeper.run(Clock(REST))
    kept = sum(storage.counts.values())
    assert storage.counts["list catalogue"] == REST / LOOK_SECONDS
    assert kept <= REST / LOOK_SECONDS + 15 * REST / SWEEP_SECONDS
    storage.forget()
    for _ in range(round(REST / REST_SECONDS)):
        dispatcher.dispatch_once(lease_term)
    renewals = REST / (dispatcher.lease.seconds / 4)
    assert sum(storage.counts.values()) + kept + renewals <= 2 * REST
