"""Test what `genmodels run` does for the storage, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from genmodels.registry import catalogue_keeper
from genmodels.registry.catalogue import CatalogueReader, shard_of
from services.local.platform import LocalPlatform
from tests.support.published_models import publish
from tests.support.ray_node import until
from tests.support.storages import FailingStorage, MemoryStorage


def test_the_catalogue_is_repaired_although_there_is_no_dispatcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_keeper, "LOOK_SECONDS", 0.01)
    storage = FailingStorage(MemoryStorage(), f"catalogue/{shard_of('m')}")
    publish(storage, "m", "vae")
    reader = CatalogueReader(storage)
    reader.refresh()
    storage.away = True
    publish(storage, "m", "vae", step=2)
    storage.away = False

    def latest() -> int | None:
        reader.refresh()
        entry = reader.get("m")
        return entry.latest if entry else None

    assert latest() == 1, "the writer has left an intent"
    with LocalPlatform(storage, tmp_path, 1):
        until(lambda: latest() == 2, "the catalogue follows", 20)
