"""Test the catalogue: it follows each change, at a cost that does not grow, and survives deaths, races and damage."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genmodels.errors import KeyNotFound, StorageUnavailable
from genmodels.family import EvaluationMetric, EvaluationResult
from genmodels.registry.catalogue import HEAD, PENDING, SHARDS, Catalogue, CatalogueReader, shard_of
from genmodels.registry.catalogue_keeper import LOOKS_BEFORE_DELETION, LOOKS_BEFORE_REPAIR, CatalogueKeeper
from genmodels.registry.removal import delete_model, delete_version
from genmodels.registry.store import Registry
from genmodels.registry.versions import Version
from genmodels.storage import Storage
from tests.support.counting_storage import CountingStorage
from tests.support.published_models import publish
from tests.support.storages import FailingStorage, MemoryStorage, PausedStorage, Wrapped, in_threads

SIZES = {"size": "16x16", "channels": 1, "latent_dim": 4}


@pytest.fixture(scope="module")
def template() -> Version:
    """Return a published version, to be stored under other names: publishing takes long."""
    return publish(MemoryStorage(), "template", "vae")


@pytest.fixture
def fill(template: Version) -> Callable[..., None]:
    """Store versions of models, each with the alias production, as an earlier release has left them."""

    def fill(storage: Storage, *models: str, version: int = 1) -> None:
        for model in models:
            document = template.model_copy(update={"model": model, "version": version}).model_dump(mode="json")
            storage.put(f"models/{model}/versions/{version:08d}.json", _json(document))
            storage.put(f"models/{model}/aliases/production.json", _json({"version": version}))

    return fill


def _json(document: Any) -> bytes:
    return json.dumps(document).replace("NaN", '"nan"').encode()


def read(storage: Storage) -> CatalogueReader:
    reader = CatalogueReader(storage)
    reader.refresh()
    return reader


def agrees(storage: Storage) -> bool:
    """Return whether the catalogue is equal to one that is built anew."""
    reader, copy = read(storage), MemoryStorage()
    for key in storage.list("models/"):
        copy.put(key, storage.get(key)[0])
    afresh = read(copy)
    return {name: reader.get(name) for name in reader.models()} == {name: afresh.get(name) for name in afresh.models()}


# ---- what it tells


def test_an_entry_tells_what_lists_and_checks_of_requests_need() -> None:
    storage = MemoryStorage()
    Catalogue(storage).ensure()
    first = publish(storage, "shapes", "vae")
    publish(storage, "shapes", "vae", step=2, alias="next")
    publish(storage, "shapes", "vae", step=3, alias=None)
    result = EvaluationResult(
        metrics={"nll": EvaluationMetric(value=97.0), "odd": EvaluationMetric(value=float("inf"))}
    )
    Registry(storage).record_evaluation(first, result, thorough=True, seconds=1)
    entry = read(storage).get("shapes")
    assert entry is not None
    assert (entry.aliases, entry.latest, entry.count, entry.numbers) == ({"next": 2, "production": 1}, 3, 3, [1, 2, 3])
    assert list(entry.versions) == [1, 2, 3]
    summary = entry.versions[1]
    assert (summary.family, summary.serving.kind, summary.serving.sizes) == ("vae", "image", SIZES)
    assert summary.serving.verbs == ["decode", "encode", "generate", "interpolate", "reconstruct"]
    assert summary.serving.memory > 0
    assert summary.bytes == sum(file.size for file in first.files.values())
    assert summary.metrics == {"val_loss": 1.5, "odd": None}
    assert (summary.job, summary.checkpoint, summary.created) == (first.job, first.checkpoint, first.created)
    assert summary.evaluation is not None
    assert (summary.evaluation.thorough, summary.evaluation.metrics) == (True, {"nll": 97.0, "odd": None})
    assert [entry.number(name) for name in ("next", "latest", "2", "4", "other")] == [2, 3, 2, None, None]
    assert agrees(storage)


@pytest.mark.parametrize("family", ["autoencoder", "gan", "minigpt", "vae"])
def test_a_version_of_an_earlier_release_is_described_from_its_configuration(family: str) -> None:
    storage = MemoryStorage()
    version = publish(storage, "model", family)
    assert version.serving is not None
    document = version.model_dump(mode="json", exclude={"serving"})
    storage.put("models/model/versions/00000001.json", _json(document))
    entry = read(storage).get("model")
    assert entry is not None
    assert entry.versions[1].serving == version.serving


def test_each_change_is_followed_and_tells_its_model(fill: Callable[..., None]) -> None:
    storage = MemoryStorage()
    fill(storage, "others")
    reader = read(storage)
    registry = Registry(storage)
    version = publish(storage, "m", "vae", alias=None)
    publish(storage, "m", "vae", step=2, alias=None)
    changes: list[Callable[[], Any]] = [
        lambda: registry.promote("m", "production", 1, "test"),
        lambda: registry.promote("m", "next", 2, "test"),
        lambda: registry.promote("m", "production", 2, "test"),
        lambda: registry.record_evaluation(version, EvaluationResult(), thorough=False, seconds=1),
        lambda: delete_version(registry, "m", 1),
        lambda: registry.remove_alias("m", "next"),
        lambda: delete_model(storage, "m"),
    ]
    assert reader.refresh() == {"m"}
    for change in changes:
        change()
        assert reader.refresh() == {"m"} or change is changes[3]  # version 1 is neither the latest nor named
        assert reader.refresh() == set()
        assert agrees(storage)
        assert storage.list(PENDING) == []
    assert reader.models() == ["others"]


def test_damaged_objects_of_a_model_are_told_and_the_others_stay(fill: Callable[..., None]) -> None:
    storage = MemoryStorage()
    fill(storage, "bad", "good")
    fill(storage, "bad", version=2)
    storage.put("models/bad/versions/00000002.json", b"")
    storage.put("models/bad/aliases/next.json", b"")
    reader = read(storage)
    entry = reader.get("bad")
    assert entry is not None
    assert sorted(entry.damaged) == ["2", "next"]
    assert "models/bad/versions/00000002.json: damaged" in entry.damaged["2"]
    assert (entry.aliases, entry.latest, entry.versions) == ({"production": 2}, 2, {})
    assert reader.get("good") is not None


# ---- what it costs


@pytest.mark.parametrize("n", [10, 200])
def test_a_reader_at_rest_makes_one_operation_and_a_move_costs_two(fill: Callable[..., None], n: int) -> None:
    storage = CountingStorage()
    fill(storage, *(f"model-{i}" for i in range(n)))
    fill(storage, "model-7", version=2)
    reader = read(storage)
    assert len(reader.models()) == n
    storage.forget()
    for _ in range(5):
        assert reader.refresh() == set()
    assert storage.counts == {"get catalogue": 5}
    storage.forget()
    Registry(storage).promote("model-7", "next", 1, "test")
    catalogue = {name: count for name, count in storage.counts.items() if name.endswith("catalogue")}
    # the head, the shard, and the head again; the intent, the shard, and the head
    assert catalogue == {"get catalogue": 3, "put catalogue": 3, "delete catalogue": 1}
    assert sum(storage.counts.values()) <= 25
    storage.forget()
    assert reader.refresh() == {"model-7"}
    assert storage.counts == {"get catalogue": 2}


@pytest.mark.parametrize("n", [10, 200])
def test_publishing_costs_the_same_however_many_versions_there_are(
    fill: Callable[..., None], template: Version, tmp_path: Path, n: int
) -> None:
    storage = CountingStorage()
    for number in range(1, n + 1):
        fill(storage, "model", version=number)
        storage.put(f"models/model/blobs/{number:064x}", b"")
    read(storage)
    publish(storage, "model", "vae", step=2)
    storage.forget()
    assert publish(storage, "model", "vae", step=3).version == n + 2
    reads = storage.counts["get models"]
    assert reads <= 20
    assert storage.listed <= 10, "no list of all versions or files"
    assert sum(storage.counts.values()) <= 60


# ---- deaths and races


class Died(BaseException):
    """Stand in for the death of a process."""


class Dying(Wrapped):
    """Die before or after the n-th write or deletion."""

    def __init__(self, inner: Storage, moment: int, after: bool) -> None:
        super().__init__(inner)
        self.moment, self.is_after, self.writes = moment, after, 0

    def before(self, verb: str, key: str) -> None:
        self.writes += verb in ("put", "delete")
        self._maybe(verb, not self.is_after)

    def after(self, verb: str, key: str) -> None:
        self._maybe(verb, self.is_after)

    def _maybe(self, verb: str, now: bool) -> None:
        if now and verb in ("put", "delete") and self.writes == self.moment:
            raise Died


def copy(storage: MemoryStorage) -> MemoryStorage:
    result = MemoryStorage()
    result.objects = dict(storage.objects)
    return result


CHANGES: dict[str, Callable[[Storage], Any]] = {
    "publish": lambda storage: publish(storage, "m", "vae", step=2),
    "promote": lambda storage: Registry(storage).promote("m", "next", 1, "test"),
    "remove": lambda storage: Registry(storage).remove_alias("m", "production"),
    "delete": lambda storage: delete_model(storage, "m"),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", [*CHANGES])
def test_a_writer_that_dies_at_any_write_is_followed_by_the_keeper(name: str, after: bool) -> None:
    base = MemoryStorage()
    publish(base, "m", "vae")
    read(base)
    for moment in itertools.count(1):
        storage = copy(base)
        dying = Dying(storage, moment, after)
        try:
            CHANGES[name](dying)
        except Died:
            keeper = CatalogueKeeper(storage)
            for _ in range(LOOKS_BEFORE_REPAIR):
                keeper.look()
            assert agrees(storage), moment
            continue
        assert agrees(storage)
        assert storage.list(PENDING) == []
        if dying.writes < moment:
            assert moment > 5
            return


def test_the_intent_of_a_writer_that_was_paused_stays_for_minutes(fill: Callable[..., None]) -> None:
    storage = MemoryStorage()
    fill(storage, "m")
    keeper = CatalogueKeeper(storage)
    with Catalogue(storage).following("m"):
        for _ in range(LOOKS_BEFORE_DELETION - 1):
            keeper.look()
        assert len(storage.list(PENDING)) == 1
        keeper.look()
        assert storage.list(PENDING) == []
    with pytest.raises(KeyNotFound), Catalogue(storage).following("m"):
        raise KeyNotFound("the body fails")
    assert len(storage.list(PENDING)) == 1


@pytest.mark.parametrize("only", ["catalogue/", "catalogue/pending", HEAD, f"catalogue/{shard_of('m')}"])
def test_a_change_never_fails_because_of_the_catalogue(only: str, caplog: pytest.LogCaptureFixture) -> None:
    storage = FailingStorage(MemoryStorage(), only)
    publish(storage, "m", "vae")
    reader = read(storage)
    storage.away = True
    assert publish(storage, "m", "vae", step=2).version == 2
    assert Registry(storage).alias("m", "production").version == 2
    assert "the catalogue shows a change of model 'm' later" in caplog.text
    storage.away = False
    keeper = CatalogueKeeper(storage)
    for _ in range(LOOKS_BEFORE_REPAIR):
        keeper.look()
    for _ in range(100 if only == "catalogue/" else 0):  # without an intent, the sweep notices
        keeper.sweep()
    reader.refresh()
    entry = reader.get("m")
    assert entry is not None
    assert (entry.latest, entry.aliases) == (2, {"production": 2})


def test_a_reader_keeps_its_entries_through_an_outage(fill: Callable[..., None]) -> None:
    storage = FailingStorage(MemoryStorage())
    fill(storage, "first", "second")
    reader = read(storage)
    Registry(storage).promote("first", "next", 1, "test")
    Registry(storage).promote("second", "next", 1, "test")
    storage.away = True
    with pytest.raises(StorageUnavailable):
        reader.refresh()
    assert reader.models() == ["first", "second"]
    storage.away, storage.only = False, f"catalogue/{shard_of('second')}"
    storage.away = True  # the answers end between two shards
    with pytest.raises(StorageUnavailable):
        reader.refresh()
    storage.away = False
    assert reader.refresh() == {"first", "second"}
    assert reader.aliases() == {
        f"{model}@{alias}": 1 for model in ("first", "second") for alias in ("next", "production")
    }


def missing(storage: Storage, key: str) -> None:
    storage.delete(key)


def damaged(storage: Storage, key: str) -> None:
    storage.put(key, b"Dear diary")


@pytest.mark.parametrize("spoil", [missing, damaged])
@pytest.mark.parametrize("key", [HEAD, f"catalogue/{shard_of('m')}.json"])
def test_damage_is_logged_once_and_mended_while_readers_go_on(
    fill: Callable[..., None], caplog: pytest.LogCaptureFixture, key: str, spoil: Callable[[Storage, str], None]
) -> None:
    storage = MemoryStorage()
    fill(storage, "m", "other")
    reader = read(storage)
    spoil(storage, key)
    Registry(storage).promote("m", "next", 1, "test")  # a writer that sees the damage, too
    if key != HEAD:
        Catalogue(storage)._publish({shard_of("m"): "a new generation"})
    caplog.clear()
    for _ in range(3):
        reader.refresh()
    assert [record.name for record in caplog.records if "old entries stay" in record.message] == ["genmodels.registry"]
    assert reader.models() == ["m", "other"]
    assert reader.aliases()["m@production"] == 1
    keeper = CatalogueKeeper(storage)
    for _ in range(LOOKS_BEFORE_REPAIR):
        keeper.look()
    reader.refresh()
    assert reader.aliases()["m@next"] == 1
    assert agrees(storage)


@pytest.mark.parametrize("spoil", [missing, damaged])
@pytest.mark.parametrize("key", [HEAD, f"catalogue/{shard_of('m')}.json"])
def test_a_reader_that_has_no_entries_builds_what_is_damaged(
    fill: Callable[..., None], key: str, spoil: Callable[[Storage, str], None]
) -> None:
    storage = MemoryStorage()
    fill(storage, "m", "other")
    read(storage)
    spoil(storage, key)
    assert read(storage).models() == ["m", "other"]


def test_the_sweep_notices_what_was_changed_by_hand(fill: Callable[..., None]) -> None:
    storage = MemoryStorage()
    fill(storage, "gone", "moved", "spoiled", "stays")
    reader = read(storage)
    for key in storage.list("models/gone/"):
        storage.delete(key)
    fill(storage, "moved", "new", version=2)
    storage.put(f"catalogue/{shard_of('spoiled')}.json", b"")
    keeper = CatalogueKeeper(storage)
    for _ in range(len(SHARDS) + 5):
        keeper.sweep()
    reader.refresh()
    assert reader.models() == ["moved", "new", "spoiled", "stays"]
    assert reader.aliases()["moved@production"] == 2
    assert agrees(storage)


def test_a_change_at_any_moment_of_the_building_is_in_it(template: Version, fill: Callable[..., None]) -> None:
    base = MemoryStorage()
    fill(base, "a", "b", "m")

    def change(storage: MemoryStorage) -> None:
        Registry(storage).promote("m", "next", 1, "test")
        with Registry(storage).catalogue.following("new"):
            fill(storage, "new")
        Registry(storage).remove_alias("a", "production")

    for moment in itertools.count(1):
        storage = copy(base)
        paused = PausedStorage(storage, moment, lambda: change(storage))  # noqa: B023
        Catalogue(paused).rebuild()
        if paused.operations < moment:
            assert moment > 20
            return
        reader = read(storage)
        expected = {"b@production": 1, "m@next": 1, "m@production": 1, "new@production": 1}
        assert reader.aliases() == expected, moment
        assert agrees(storage), moment


def test_concurrent_writers_and_builders_lose_nothing(s3_storage: Storage, fill: Callable[..., None]) -> None:
    models = [f"model-{i}" for i in range(6)]
    fill(s3_storage, *models)

    def work(i: int) -> None:
        if i >= len(models):
            Catalogue(s3_storage).rebuild()
            return
        for alias in ("one", "two"):
            Registry(s3_storage).promote(models[i], alias, 1, "test")
        Registry(s3_storage).remove_alias(models[i], "one")

    assert in_threads(len(models) + 2, work) == [None] * 8
    reader = read(s3_storage)
    assert reader.aliases() == {f"{model}@{alias}": 1 for model in models for alias in ("production", "two")}
    assert s3_storage.list(PENDING) == []
    assert reader.refresh() == set()
