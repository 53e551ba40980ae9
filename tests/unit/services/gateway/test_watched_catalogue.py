"""Test that the gateway knows the pool of a name, and learns of new versions."""

from __future__ import annotations

import pytest

from genmodels.errors import ModelNotFound
from genmodels.registry.store import Registry
from genmodels.storage import Storage
from services.gateway import watched_catalogue
from services.gateway.watched_catalogue import WatchedCatalogue
from tests.support.counting_storage import CountingStorage
from tests.support.published_models import publish
from tests.support.ray_node import until
from tests.support.storages import FailingStorage


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_catalogue, "READ_SECONDS", 0.05)


def test_the_pool_of_a_name_is_that_of_its_version(file_storage: Storage) -> None:
    publish(file_storage, "m", "vae")
    publish(file_storage, "m", "vae", step=2, alias=None)
    publish(file_storage, "m", "vae", step=3, alias="next", pool="gpu")
    assert [Registry(file_storage).version("m", number).pool for number in (1, 2, 3)] == ["default", "default", "gpu"]
    catalogue = WatchedCatalogue(file_storage)
    pools = {name: catalogue.pool_of(name) for name in ("m", "m@production", "m@1", "m@3", "m@next", "m@latest")}
    assert pools == {
        "m": "default",
        "m@production": "default",
        "m@1": "default",
        "m@3": "gpu",
        "m@next": "gpu",
        "m@latest": "gpu",
    }
    # Not in the catalogue: an older version, checkpoints of runs, an alias that does not exist, another model.
    assert [catalogue.pool_of(name) for name in ("m@2", "m@live", "m@step-5", "m@none", "other")] == [
        *["gpu"] * 4,
        "default",
    ]


def test_what_the_catalogue_does_not_have_is_looked_up_in_storage() -> None:
    """So a name without a model starts no host, and an older version or a checkpoint of a run does."""
    storage = CountingStorage()
    for step in (1, 2):
        publish(storage, "m", "vae", step=step)
    catalogue = WatchedCatalogue(storage)
    storage.forget()
    for name in ("m", "m@production", "m@2", "m@latest"):
        catalogue.check(name)
    assert [name for name in storage.counts if not name.endswith(" catalogue")] == []
    catalogue.check("m@1")
    for name in ("other", "m@none", "m@3", "other@live", "No Model", "../m", "a@b@c"):
        with pytest.raises(ModelNotFound):
            catalogue.check(name)
    storage.put("models/ill/aliases/production.json", b"damaged")
    catalogue.check("ill")
    catalogue._storage = away = FailingStorage(storage)
    away.away = True
    catalogue.check("other")


def test_a_promotion_to_another_pool_is_learnt_without_a_restart(file_storage: Storage) -> None:
    publish(file_storage, "m", "vae")
    catalogue = WatchedCatalogue(file_storage)
    publish(file_storage, "m", "vae", step=2, pool="gpu")
    until(lambda: catalogue.pool_of("m") == "gpu", "the promotion is learnt", 10)
    assert catalogue.stalled() is None
