"""Test the list of models: pages, keys, and what it shows, from the catalogue alone."""

from __future__ import annotations

from typing import Any

import pytest

from genmodels.keys import Keys
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.removal import delete_model
from genmodels.storage import Storage
from services.gateway import model_views, routes
from services.gateway.routes import create_app
from services.http.listing import Listing, ModelsQuery
from tests.support.asgi_client import ask, refused
from tests.support.counting_storage import CountingStorage
from tests.support.published_models import copy_model, publish
from tests.support.storages import MemoryStorage


class Pool:
    """A pool without hosts: a call to one is an AttributeError."""

    def __init__(self, storage: Storage) -> None:
        self.catalogue = CatalogueReader(storage)
        self.catalogue.refresh()


@pytest.fixture(scope="module")
def template() -> MemoryStorage:
    storage = MemoryStorage()
    publish(storage, "template", "vae")
    return storage


def listed(app: Any, query: str = "", **options: Any) -> dict[str, Any]:
    response = ask(app, "GET", f"/v1/models{query}", **options)
    assert response.status_code == 200, response.text
    return response.json()


def ids(page: dict[str, Any]) -> list[str]:
    return [model["id"] for model in page["data"]]


@pytest.mark.parametrize("n", [10, 200])
def test_a_list_makes_no_storage_operation_and_calls_no_host(template: MemoryStorage, n: int) -> None:
    storage = CountingStorage()
    copy_model(storage, template, *(f"model-{i:03d}" for i in range(n)))
    app = create_app(Pool(storage))
    storage.forget()
    page = listed(app)
    assert ids(page) == [f"model-{i:03d}" for i in range(n)]
    assert (page["object"], page["has_more"]) == ("list", False)
    assert not storage.counts


def test_pages_follow_each_other(template: MemoryStorage) -> None:
    storage = MemoryStorage()
    names = [f"model-{i}" for i in range(7)]
    copy_model(storage, template, *names)
    storage.delete("models/model-2/aliases/production.json")
    app = create_app(Pool(storage))
    pages, after = [], ""
    while True:
        page = listed(app, f"?limit=3&after={after}")
        pages.append(ids(page))
        after = page.get("last_id", "")
        if not page["has_more"]:
            break
    names[2] = "model-2@1"
    assert pages == [names[:3], names[3:6], names[6:]]
    assert listed(app, "?after=zzz") == {"object": "list", "has_more": False, "data": []}
    assert refused(ask(app, "GET", "/v1/models?limit=0"), 400)["param"] == "limit"
    assert refused(ask(app, "GET", "/v1/models?page=2"), 400)["param"] == "page"


def test_a_key_sees_its_models_and_full_pages(template: MemoryStorage) -> None:
    storage = MemoryStorage()
    copy_model(storage, template, *(f"{prefix}-{i}" for i in range(4) for prefix in ("mine", "other")))
    _, token = Keys(storage).create("me", ("generate",), prefixes=("mine-",))
    app = create_app(Pool(storage), hosts=None, keys=Keys(storage))
    headers = {"authorization": f"Bearer {token}"}
    page = listed(app, "?limit=3", headers=headers)
    assert (ids(page), page["has_more"]) == (["mine-0", "mine-1", "mine-2"], True)
    page = listed(app, "?limit=3&after=mine-2", headers=headers)
    assert (ids(page), page["has_more"]) == (["mine-3"], False)


def test_a_model_is_shown_anew_when_it_changes_and_a_damaged_one_with_its_problem(template: MemoryStorage) -> None:
    storage = MemoryStorage()
    copy_model(storage, template, "bad", "good", "moves")
    storage.put("models/bad/versions/00000001.json", b"")
    pool = Pool(storage)
    app = create_app(pool)
    bad, good, moves = listed(app)["data"]
    assert "models/bad/versions/00000001.json: damaged" in bad["problem"]
    assert (bad["family"], bad["version"], bad["metrics"]) == (None, None, {})
    assert "problem" not in good
    assert moves["version"] == 1
    publish(storage, "moves", "gan", step=2)
    pool.catalogue.refresh()
    moves = listed(app)["data"][2]
    assert (moves["version"], moves["family"], moves["verbs"]) == (2, "gan", ["decode", "generate", "interpolate"])


def test_the_json_of_a_model_is_made_once(template: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, made = MemoryStorage(), []
    copy_model(storage, template, "a", "b")
    view = model_views.model_view
    monkeypatch.setattr(routes, "model_view", lambda entry: made.append(entry.model) or view(entry))
    app = create_app(Pool(storage))
    assert listed(app) == listed(app)
    assert made == ["a", "b"]


def test_deleted_models_take_no_memory(template: MemoryStorage) -> None:
    storage = MemoryStorage()
    copy_model(storage, template, "a", "b")
    pool, shown = Pool(storage), Listing(model_views.model_view, model_views.shown_name)
    query = ModelsQuery(limit=1000, after="")
    shown.page(pool.catalogue, query, lambda _: True)
    delete_model(storage, "a")
    pool.catalogue.refresh()
    shown.page(pool.catalogue, query, lambda _: True)
    assert list(shown._shown) == ["b"]
