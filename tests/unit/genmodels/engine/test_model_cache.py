"""Test the models in memory of a host, apart from its requests."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from genmodels.engine import loader
from genmodels.engine.model_cache import ModelCache
from genmodels.errors import CheckpointError
from genmodels.registry.references import of_version
from genmodels.registry.store import Registry
from tests.support.published_models import publish
from tests.support.storages import MemoryStorage


def test_a_model_that_is_refused_leaves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refusal is remembered, but not the weights that the frames of the error hold."""
    storage, models = MemoryStorage(), []
    one, two = (publish(storage, "m", "vae", step=step) for step in (1, 2))
    mixed = one.model_copy(update={"files": {**one.files, "probe.safetensors": two.files["probe.safetensors"]}})
    resolved = of_version(Registry(storage), mixed)
    build = loader.load_folder

    def built(*args: Any) -> Any:
        model = build(*args)
        models.append(weakref.ref(model.family))
        return model

    monkeypatch.setattr(loader, "load_folder", built)
    with ThreadPoolExecutor(1) as loaders:
        cache = ModelCache(storage, 2**30, lambda model: None, loaders)
        for _ in range(3):
            refusal = cache.load(resolved).exception()
            with pytest.raises(CheckpointError, match="differs") as again:
                cache.load(resolved).result()
            assert again.value is refusal
            frames = len(again.traceback)
            assert frames < 5  # of this request alone
    del again, refusal
    gc.collect()
    assert [model() for model in models] == [None]
