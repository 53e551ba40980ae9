"""Test how a model host loads and follows models: swaps without failed requests, refused versions, names, memory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genmodels.engine import model_cache, warmup
from genmodels.engine.image.answers import answer
from genmodels.engine.image.requests import GenerateRequest
from genmodels.engine.loader import load
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.completion import complete
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError, StorageUnavailable
from genmodels.metrics import REFUSED, STORAGE_SECONDS
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.references import resolve_model
from genmodels.registry.store import Registry
from genmodels.sizing.placement import Placement
from genmodels.storage import Storage, open_storage
from services.gateway import model_host, models
from services.gateway.model_host import CompletionStarted, ModelHost
from services.gateway.routes import create_app
from tests.support.asgi_client import ask, refused
from tests.support.metric_values import series
from tests.support.published_models import publish, publish_copies, save_checkpoint
from tests.support.watched_hosts import watch

GENERATE = {"prompt": "", "seed": 3}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Return a storage with a VAE and a text model, one version each."""
    storage = open_storage(tmp_path.as_uri())
    publish(storage, "shapes", "vae")
    publish(storage, "play", "minigpt")
    return storage


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make hosts read the registry only when a test calls `watch`."""
    monkeypatch.setattr(model_host, "_watch", lambda _: None)
    monkeypatch.setattr("genmodels.engine.alias_watcher.CACHE_TTL_SECONDS", 0.0)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the loaded models, in order."""
    names: list[str] = []
    monkeypatch.setattr(
        model_cache,
        "load",
        lambda storage, resolved, *rest: names.append(resolved.name) or load(storage, resolved, *rest),
    )
    return names


def version_of(app: Any, name: str) -> str:
    """Return the version that answers to a name."""
    response = ask(app, "POST", "/v1/images/generations", {"model": name, **GENERATE})
    assert response.status_code == 200, response.text
    assert response.json()["data"][0]["b64_json"]
    return response.headers["x-genmodels-version"]


def entry(app: Any, name: str) -> dict[str, Any]:
    response = ask(app, "GET", f"/v1/models/{name}")
    assert response.status_code == 200, response.text
    return response.json()


def test_a_new_replica_loads_what_is_asked_for(storage: Storage, loads: list[str]) -> None:
    publish(storage, "shapes", "vae", step=2, alias="next")
    publish(storage, "shapes", "vae", step=3, alias=None)
    app = create_app(ModelHost(storage.url))
    assert loads == []
    names = ("shapes", "shapes@next", "shapes@2", "shapes@latest", "shapes@production")
    assert [version_of(app, name) for name in names] == ["shapes@1", "shapes@2", "shapes@2", "shapes@3", "shapes@1"]
    assert loads == ["shapes@1", "shapes@2", "shapes@3"]


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 64), ({"memory": 2**20}, 16), ({"slots": 4}, 4), ({"slots": 100}, 100)], ids=str
)
def test_the_slots_of_a_text_model(storage: Storage, options: dict[str, Any], expected: int) -> None:
    """Count them in the memory too: a model that is small for its host has more than one that fills it."""
    host = ModelHost(storage.url, pin=["play"], **options)
    loaded: Any = host._cache._entries["play@1"]
    assert loaded.model.batcher.slots == expected
    family = loaded.model.family
    assert loaded.size == family.footprint(family.config, family.data, Placement(rows=expected)).total


def test_a_new_replica_has_pinned_models_before_it_takes_traffic_and_keeps_them(
    storage: Storage, loads: list[str]
) -> None:
    publish(storage, "shapes", "vae", step=2, alias="next")
    host = ModelHost(storage.url, pin=["shapes@next", "play", "nothing"])
    assert sorted(loads) == ["play@1", "shapes@2"]
    assert (
        "the registry has no version of the pinned name nothing@production"
        in host._watcher.refused["nothing@production"].reason
    )
    watch(host)
    assert sorted(host._pins._kept) == ["play@1", "shapes@2"]
    publish(storage, "shapes", "vae", step=3, alias="next")
    for _ in range(2):
        watch(host)
    assert sorted(host._pins._kept) == sorted(host._cache._entries) == ["play@1", "shapes@3"]


def test_models_that_change_during_an_outage_are_pinned_after_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ModelHost(storage.url, pin=1)
    assert version_of(create_app(host), "shapes") == "shapes@1"
    publish(storage, "shapes", "vae", step=2)
    publish(storage, "newest", "vae")

    def fail(*_: object) -> None:
        raise StorageUnavailable("away")

    with monkeypatch.context() as outage:
        outage.setattr("genmodels.engine.alias_watcher.resolve_model", fail)
        watch(host)
    for _ in range(2):
        watch(host)
    assert sorted(host._pins._kept) == ["newest@1"]


def test_a_host_remembers_the_descriptions_of_so_many_models(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.catalog.MAX_KEPT", 2)
    publish(storage, "shapes", "vae", step=2, alias="next")
    host = ModelHost(storage.url)
    app = create_app(host)
    for step in (1, 2, 3):
        save_checkpoint(storage, "job-00000000", "shapes", "vae", step=step)
        watch(host)
        assert entry(app, "shapes@live")["kind"] == "image"
    for name in ("shapes@1", "play", "shapes@2"):
        entry(app, name)
    assert list(host._catalog._entries) == [f"shapes@job-00000000:step-{step}" for step in (2, 3)]
    assert list(host._catalog._evaluations) == ["play@1", "shapes@2"]


def test_a_replica_can_pin_the_newest_models_in_production(storage: Storage, loads: list[str]) -> None:
    publish(storage, "shapes", "vae", step=2, alias="next")
    publish(storage, "newest", "vae")
    host = ModelHost(storage.url, pin=2)
    assert sorted(loads) == ["newest@1", "play@1"]
    ModelHost(storage.url, pin=2, pool="gpu")
    assert len(loads) == 2, "all models are of the pool default"
    publish(storage, "newer", "autoencoder")
    for _ in range(2):
        watch(host)
    assert sorted(host._pins._kept) == ["newer@1", "newest@1"]
    half = host.catalogue.get("newest").versions[1].serving.memory * 2 + 1
    assert [*ModelHost(storage.url, pin=2, memory=half)._pins._names] == ["newer@production"]


def test_a_version_takes_over_when_it_is_in_memory_and_the_old_one_goes(storage: Storage) -> None:
    host = ModelHost(storage.url)
    app = create_app(host)
    assert version_of(app, "shapes") == "shapes@1"
    publish(storage, "shapes", "vae", step=2)
    assert version_of(app, "shapes") == "shapes@1"
    watch(host)
    assert version_of(app, "shapes") == "shapes@2"
    assert "shapes@1" not in host._cache._entries
    Registry(storage).promote("shapes", "production", 1, "rolled back")
    watch(host)
    assert version_of(app, "shapes") == "shapes@1"
    assert entry(app, "shapes")["version"] == 1


def test_an_alias_that_moves_while_its_version_is_not_in_memory_loads_nothing(
    storage: Storage, loads: list[str]
) -> None:
    host = ModelHost(storage.url)
    app = create_app(host)
    publish(storage, "shapes", "vae", step=2)
    assert version_of(app, "shapes") == "shapes@1"
    host._cache.unload_when_idle("shapes@1")
    watch(host)
    assert loads == ["shapes@1"]
    assert version_of(app, "shapes") == "shapes@2"


def test_a_version_that_does_not_fit_beside_the_old_one_takes_over_at_its_next_request(storage: Storage) -> None:
    host = ModelHost(storage.url)
    app = create_app(host)
    assert version_of(app, "shapes") == "shapes@1"
    size = host._cache._entries["shapes@1"].size
    host = ModelHost(storage.url, memory=size + size // 2)
    app = create_app(host)
    assert version_of(app, "shapes") == "shapes@1"
    publish(storage, "shapes", "vae", step=2)
    watch(host)
    assert version_of(app, "shapes") == "shapes@2"
    assert list(host._cache._entries) == ["shapes@2"]
    assert host._watcher.refused == {}


def test_a_new_model_is_there_at_once(storage: Storage) -> None:
    app = create_app(ModelHost(storage.url))
    publish(storage, "more", "autoencoder")
    assert version_of(app, "more") == "more@1"


def test_a_stream_ends_with_the_version_that_began_it(storage: Storage) -> None:
    host = ModelHost(storage.url)
    request = CompletionRequest.model_validate({"prompt": "To be", "max_tokens": 300, "seed": 4})

    async def whole(name: str) -> str:
        items = [item async for item in host.complete(name, request)]
        return "".join(item.text for item in items if isinstance(item, TextDelta))

    async def through_a_swap() -> tuple[str, str]:
        items = host.complete("play", request)
        started = await anext(items)
        assert isinstance(started, CompletionStarted)
        publish(storage, "play", "minigpt", step=2)
        await asyncio.to_thread(watch, host)
        assert "play@1" in host._cache._entries
        text = "".join([item.text async for item in items if isinstance(item, TextDelta)])
        assert "play@1" not in host._cache._entries
        return started.model, text

    expected = asyncio.run(whole("play"))
    assert asyncio.run(through_a_swap()) == ("play@1", expected)
    assert asyncio.run(whole("play")) != expected
    assert asyncio.run(whole("play@1")) == expected


@pytest.mark.slow
def test_twenty_swaps_under_load_fail_no_request_and_cut_no_stream(storage: Storage) -> None:
    """Requests arrive without a wait for earlier answers; each answer is that of the version it names."""
    pictures = GenerateRequest(seed=7)
    writing = CompletionRequest.model_validate({"prompt": "To be", "max_tokens": 30, "seed": 4})
    for step in range(2, 6):
        publish(storage, "shapes", "vae", step=step, alias=None)
        publish(storage, "play", "minigpt", step=step, alias=None)
    oracle: dict[str, object] = {}
    for number in range(1, 6):
        oracle[f"shapes@{number}"] = answer(load(storage, resolve_model(storage, f"shapes@{number}")), pictures).images
        model = load(storage, resolve_model(storage, f"play@{number}"))
        oracle[f"play@{number}"] = "".join(delta.text for delta in complete(model, writing))
    assert len(set(map(str, oracle.values()))) == 10
    host = ModelHost(storage.url)

    async def draw() -> tuple[str, object]:
        result = await host.answer("shapes", pictures)
        assert not isinstance(result, RequestError), result
        return result.model, result.images

    async def write() -> tuple[str, object]:
        started, *deltas = [item async for item in host.complete("play", writing)]
        assert isinstance(started, CompletionStarted), started
        assert all(isinstance(delta, TextDelta) for delta in deltas), deltas
        assert deltas[-1].finish_reason == "length"
        return started.model, "".join(delta.text for delta in deltas)

    async def swaps() -> None:
        for number in range(20):
            for name in ("shapes", "play"):
                Registry(storage).promote(name, "production", 1 + (number + 1) % 5, "swap")
            await asyncio.to_thread(watch, host)

    async def all_of_it() -> list[tuple[str, object]]:
        swapping, requests = asyncio.create_task(swaps()), []
        while not swapping.done():
            requests += [asyncio.create_task(draw()), asyncio.create_task(write())]
            await asyncio.sleep(0.02)
        await swapping
        return await asyncio.gather(*requests)

    answers = asyncio.run(all_of_it())
    assert all(oracle[name] == result for name, result in answers)
    assert {name for name, _ in answers} == set(oracle)
    assert sorted(host._cache._entries) == ["play@1", "shapes@1"]


def test_two_replicas_answer_alike(storage: Storage) -> None:
    bodies = [
        ("/v1/completions", {"model": "play", "prompt": "To be", "max_tokens": 60, "seed": 5, "n": 3, "logprobs": 2}),
        ("/v1/images/generations", {"model": "shapes", "n": 5, "seed": 5}),
    ]
    apps = [create_app(ModelHost(storage.url)) for _ in range(2)]
    for path, body in bodies:
        one, other = (ask(app, "POST", path, body).json() for app in apps)
        assert one.get("choices") == other.get("choices")
        assert one.get("data") == other.get("data")


def damaged(storage: Storage) -> str:
    version = publish(storage, "shapes", "vae", step=2)
    storage.put(f"models/shapes/blobs/{version.files['model.safetensors'].sha256}", b"nonsense")
    return "damaged"


def other_outputs(storage: Storage) -> str:
    version = publish(storage, "shapes", "vae", step=2, alias=None)
    other = publish(storage, "others", "vae", step=9)
    for name in ("model.safetensors",):
        key = f"models/shapes/blobs/{other.files[name].sha256}"
        storage.put(key, storage.get(f"models/others/blobs/{other.files[name].sha256}")[0])
        document = storage.get("models/shapes/versions/00000002.json")[0].decode()
        old, new = version.files[name], other.files[name]
        storage.put("models/shapes/versions/00000002.json", document.replace(old.sha256, new.sha256).encode())
    Registry(storage).promote("shapes", "production", 2, "a test")
    return "differs by"


def too_large(storage: Storage) -> str:
    publish(storage, "shapes", "vae", step=2, width=128)
    return "MiB of memory, and the budget is"


@pytest.mark.parametrize("spoil", [damaged, other_outputs, too_large])
def test_a_bad_version_is_refused_and_the_old_one_answers_on(
    storage: Storage, spoil: Callable[[Storage], str], loads: list[str]
) -> None:
    host = ModelHost(storage.url, memory=2**20)
    app = create_app(host)
    counted = REFUSED.labels("shapes", "vae", "2")._value
    before = counted.get()
    assert version_of(app, "shapes") == "shapes@1"
    reason = spoil(storage)
    for _ in range(3):
        watch(host)
        assert version_of(app, "shapes") == "shapes@1"
    assert loads.count("shapes@2") <= 1
    assert counted.get() == before + 1
    shown = entry(app, "shapes")
    assert (shown["version"], shown["aliases"]) == (1, {"production": 2})
    (refused_alias,) = shown["refused"]
    assert (refused_alias["alias"], refused_alias["version"]) == ("production", 2)
    assert reason in refused_alias["reason"]
    publish(storage, "shapes", "vae", step=3)
    watch(host)
    assert version_of(app, "shapes") == "shapes@3"
    assert "refused" not in entry(app, "shapes")


def test_a_slow_version_is_refused(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost(storage.url)
    app = create_app(host)
    assert version_of(app, "shapes") == "shapes@1"
    monkeypatch.setattr(warmup.warm_up, "__defaults__", (0.0,))
    publish(storage, "shapes", "vae", step=2)
    watch(host)
    assert version_of(app, "shapes") == "shapes@1"
    assert "too slow" in entry(app, "shapes")["refused"][0]["reason"]


def test_a_first_version_that_is_bad_is_503_and_stands_in_no_others_way(storage: Storage) -> None:
    version = publish(storage, "bad", "vae")
    storage.put(f"models/bad/blobs/{version.files['model.safetensors'].sha256}", b"nonsense")
    app = create_app(ModelHost(storage.url))
    response = ask(app, "POST", "/v1/images/generations", {"model": "bad", **GENERATE})
    assert (refused(response, 503)["code"], response.headers["retry-after"]) == ("version_damaged", "1")
    assert version_of(app, "shapes") == "shapes@1"
    assert "damaged" in ask(app, "GET", "/v1/models/bad").text


def test_checkpoints_of_a_run_have_names(storage: Storage) -> None:
    host = ModelHost(storage.url)
    app = create_app(host)
    save_checkpoint(storage, "study-00000001", "shapes", "vae", step=10)
    save_checkpoint(storage, "study-00000001", "shapes", "vae", step=20)
    first, second = (f"shapes@study-00000001:step-{step}" for step in (10, 20))
    assert version_of(app, "shapes@step-10") == first
    assert version_of(app, first) == first
    assert version_of(app, "shapes@live") == second
    shown = ask(app, "GET", "/v1/models/shapes@live").json()
    assert (shown["version"], shown["metrics"], shown["family"]) == (None, {"val_loss": 2.5}, "vae")
    save_checkpoint(storage, "study-00000001", "shapes", "vae", step=30)
    assert version_of(app, "shapes@live") == second
    watch(host)
    assert version_of(app, "shapes@live") == "shapes@study-00000001:step-30"
    save_checkpoint(storage, "study-00000001", "shapes", "vae", step=40, spoil=True)
    watch(host)
    assert version_of(app, "shapes@live") == "shapes@study-00000001:step-30"
    save_checkpoint(storage, "study-00000002", "shapes", "vae", step=10)
    watch(host)
    assert version_of(app, "shapes@live") == "shapes@study-00000002:step-10"
    assert version_of(app, second) == second
    for name, message in {
        "shapes@step-11": "steps of shapes in job study-00000002 with one: 10",
        "shapes@study-00000009:step-10": "none yet",
        "play@live": "no job has trained 'play'",
    }.items():
        error = refused(ask(app, "POST", "/v1/images/generations", {"model": name, **GENERATE}), 404)
        assert message in error["message"]


def budget(storage: Storage, models: float) -> int:
    """Return the memory of so many versions of `shapes`."""
    catalogue = CatalogueReader(storage)
    catalogue.refresh()
    entry = catalogue.get("shapes")
    assert entry
    return int(models * entry.versions[1].serving.memory)


@pytest.fixture
def no_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models go at once after they were loaded."""
    monkeypatch.setattr(model_cache, "MAX_STAY", 0.0)


@pytest.mark.usefixtures("no_stay")
def test_the_least_requested_goes_first_and_never_one_in_use(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(2, 5):
        publish(storage, "shapes", "vae", step=step, alias=None)
    host = ModelHost(storage.url, memory=budget(storage, 2.5))
    app = create_app(host)
    for name in ("shapes@2", "shapes@1", "shapes@2", "shapes@3"):
        assert version_of(app, name) == name
    assert sorted(host._cache._entries) == ["shapes@2", "shapes@3"], "shapes@1 had one request, shapes@2 two"
    with host._cache.acquire("shapes@2"), host._cache.acquire("shapes@3"):
        monkeypatch.setattr(model_cache, "ROOM_SECONDS", 0.1)
        response = ask(app, "POST", "/v1/images/generations", {"model": "shapes@4", **GENERATE})
        assert refused(response, 503)["code"] == "memory_full"
        assert response.headers["retry-after"] == "5"
    assert version_of(app, "shapes@4") == "shapes@4"
    assert version_of(app, "shapes") == "shapes@1"


@pytest.mark.usefixtures("no_stay")
def test_a_model_that_was_popular_in_the_past_goes_at_last(storage: Storage) -> None:
    for step in range(2, 4):
        publish(storage, "shapes", "vae", step=step, alias=None)
    app = create_app(host := ModelHost(storage.url, memory=budget(storage, 2.5)))
    for name in ["shapes@1"] * 5 + ["shapes@2", "shapes@3"] * 6:
        assert version_of(app, name) == name
    assert sorted(host._cache._entries) == ["shapes@2", "shapes@3"]


def test_two_models_that_do_not_fit_together_take_turns_and_fail_no_request(
    storage: Storage, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load of one waits until the other has stayed its time, which is longer here than all its requests take."""
    publish(storage, "shapes", "vae", step=2, alias=None)
    monkeypatch.setattr(model_cache, "MIN_STAY", 2.0)
    host = ModelHost(storage.url, memory=budget(storage, 1.5))

    async def both() -> list[Any]:
        names = ["shapes@1", "shapes@2"] * 10
        return await asyncio.gather(*(host.answer(name, GenerateRequest(seed=1)) for name in names))

    assert {result.model for result in asyncio.run(both())} == {"shapes@1", "shapes@2"}
    assert sorted(loads) == ["shapes@1", "shapes@2"]


def test_a_request_waits_for_its_model_up_to_a_bound_and_the_load_goes_on(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(model_cache, "load", lambda *arguments: go_on.wait(30) and load(*arguments))
    monkeypatch.setattr(models, "LOAD_SECONDS", 0.1)
    app = create_app(host := ModelHost(storage.url))
    for _ in range(2):
        response = ask(app, "POST", "/v1/images/generations", {"model": "shapes", **GENERATE})
        error = refused(response, 503)
        assert (error["code"], response.headers["retry-after"]) == ("model_loading", "5")
        assert error["message"] == "shapes@1 is still being loaded; try again in a moment"
    monkeypatch.setattr(models, "LOAD_SECONDS", 30.0)
    host._models._max_waiting = 0
    response = ask(app, "POST", "/v1/images/generations", {"model": "shapes", **GENERATE})
    assert "too many requests wait" in refused(response, 503)["message"]
    host._models._max_waiting = 1
    go_on.set()
    while "shapes@1" not in host._cache._entries:
        time.sleep(0.01)
    assert version_of(app, "shapes") == "shapes@1"


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Yield a counter that has all operations on storage of this process after the context."""
    before, operations = series(STORAGE_SECONDS), Counter[str]()
    yield operations
    operations.update({key[0]: int(count - before.get(key, 0)) for key, count in series(STORAGE_SECONDS).items()})


@pytest.mark.parametrize("count", [10, 200])
def test_what_a_replica_reads_does_not_grow_with_the_models(tmp_path: Path, count: int) -> None:
    storage = open_storage(tmp_path.as_uri())
    first, second, *_ = publish_copies(storage, count)
    with counted() as start:
        host = ModelHost(storage.url)
    assert set(+start) == {"get"}
    assert start["get"] <= 2 + 64, "the head twice, and the shards"
    app = create_app(host)
    assert version_of(app, first) == f"{first}@1"
    with counted() as at_rest:
        for _ in range(5):
            watch(host)
    assert +at_rest == {"get": 5}
    publish(storage, first, "vae", step=2)
    with counted() as moved:
        watch(host)
    assert version_of(app, first) == f"{first}@2"
    assert set(+moved) == {"get", "download"}
    assert moved["get"] == 3, "the head, a shard, and the version"
    publish(storage, second, "vae", step=2)
    with counted() as not_in_memory:
        watch(host)
    assert +not_in_memory == {"get": 2}, "the head and a shard"


@pytest.mark.slow
def test_a_host_of_two_threads_answers_the_same_text_many_times(storage: Storage) -> None:
    """It runs in a process of its own: a fork of a process with two threads of torch would wait for ever."""
    program = """
        import asyncio, sys
        from genmodels.engine.text.choices import TextDelta
        from genmodels.engine.text.request import CompletionRequest
        from services.gateway.model_host import ModelHost

        request = CompletionRequest.model_validate({"prompt": "To be", "max_tokens": 40, "seed": 4})

        async def text(host):
            return "".join([item.text async for item in host.complete("play", request) if isinstance(item, TextDelta)])

        async def texts(host):
            return await asyncio.gather(*(text(host) for _ in range(8)))

        for threads in (2, 1):
            host = ModelHost(sys.argv[1], torch_threads=threads)
            (result,) = {*asyncio.run(texts(host)), *asyncio.run(texts(host))}
            print(threads, len(result))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), storage.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["2", "40", "1", "40"]


def test_decoding_ends_when_a_text_model_goes(storage: Storage) -> None:
    others = set(threading.enumerate())
    host = ModelHost(storage.url, pin=["play"])
    (decoding,) = {thread for thread in threading.enumerate() if thread.name == "decode play@1"} - others
    host._pins._kept.pop("play@1").close()
    host._cache.unload_when_idle("play@1")
    decoding.join(10)
    assert not decoding.is_alive()
    body = {"model": "play", "prompt": "x", "max_tokens": 2}
    assert ask(create_app(host), "POST", "/v1/completions", body).status_code == 200


def test_requests_that_come_while_a_version_loads_wait_for_one_load(storage: Storage, loads: list[str]) -> None:
    publish(storage, "shapes", "vae", step=2, alias=None)
    host = ModelHost(storage.url)

    async def five() -> list[Any]:
        return await asyncio.gather(*(host.answer("shapes@2", GenerateRequest(seed=1)) for _ in range(5)))

    answers = asyncio.run(five())
    assert {result.model for result in answers} == {"shapes@2"}
    assert loads.count("shapes@2") == 1


def test_a_client_that_leaves_does_not_end_the_load_for_others(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(storage, "shapes", "vae", step=2, alias=None)
    host = ModelHost(storage.url)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return load(*arguments)

    monkeypatch.setattr(model_cache, "load", slow)

    async def two() -> Any:
        first, second = (asyncio.ensure_future(host.answer("shapes@2", GenerateRequest(seed=1))) for _ in range(2))
        await asyncio.to_thread(begun.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        go_on.set()
        return await second

    assert asyncio.run(two()).model == "shapes@2"


def test_through_an_outage_of_the_storage_what_is_known_is_served(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ModelHost(storage.url)
    app = create_app(host)
    publish(storage, "shapes", "vae", step=2, alias=None)
    assert [version_of(app, name) for name in ("shapes", "shapes@2")] == ["shapes@1", "shapes@2"]
    described = ask(app, "GET", "/v1/models/shapes").json()
    assert described["aliases"] == {"production": 1}

    def down(*_: Any, **__: Any) -> Any:
        raise StorageUnavailable("secret detail of the store")

    for verb in ("get", "list", "folders", "exists", "download"):
        monkeypatch.setattr(type(storage), verb, down)
    watch(host)
    assert [version_of(app, name) for name in ("shapes", "shapes@2")] == ["shapes@1", "shapes@2"]
    assert ask(app, "GET", "/v1/models/shapes").json() == described
    error = refused(ask(app, "POST", "/v1/images/generations", {"model": "shapes@7", **GENERATE}), 503)
    assert error["code"] == "storage_unavailable"
    assert "secret" not in error["message"]


def test_a_host_that_is_garbage_collected_stops_its_thread(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(model_host, "WATCH_SECONDS", 0.01)
    before = {thread for thread in threading.enumerate() if thread.name == "alias-watcher"}
    host = ModelHost(storage.url, pin=["shapes"])
    (watching,) = {thread for thread in threading.enumerate() if thread.name == "alias-watcher"} - before
    publish(storage, "shapes", "vae", step=2)
    deadline = time.monotonic() + 10
    while "shapes@2" not in host._cache._entries:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    del host
    watching.join(10)
    assert not watching.is_alive()
