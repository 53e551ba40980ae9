"""Measure the registry: a catalogue of N models, and publications of a model that has N versions."""

from __future__ import annotations

from collections.abc import Iterator

from genmodels.registry.catalogue import HEAD, SHARDS, CatalogueReader, Head, Shard, shard_of
from genmodels.registry.store import Registry
from genmodels.storage import Storage, write_document
from services.gateway.model_host import ModelHost
from tests.bench.scale.rows import Row, in_parallel, opened, timed
from tests.support.published_models import publish
from tests.support.s3_server import S3Server

PUBLISH_REQUESTS = 40
REST_REQUESTS = 2.0  # a second, of a reader of the catalogue
SERVED_SECONDS = 2.0  # from an alias that moves to a reader that knows it
READY_SECONDS = 30.0  # of a new replica
LOOKS = 20
LOOK_SECONDS = 1.0  # between two looks of a reader


def measure_catalogue(server: S3Server, n: int) -> Iterator[Row]:
    """Follow the catalogue of N models, of which one changes."""
    storage, requests = opened(server, f"catalogue-{n}")
    publish(storage, "model-0", "vae")
    publish(storage, "model-0", "vae", step=2, alias=None)
    multiply(storage, n)
    reader = CatalogueReader(storage)
    with requests.counted() as counts:
        seconds = timed(reader.refresh)
    assert len(reader.models()) == n
    yield Row("catalogue of N models, first read", n, seconds, "s")
    yield Row("catalogue of N models, first read, requests", n, counts.total(), "", len(SHARDS) + 1)
    with requests.counted() as counts:
        for _ in range(LOOKS):
            assert not reader.refresh()
    yield Row(
        "reader of the catalogue at rest, requests", n, counts.total() / LOOKS / LOOK_SECONDS, "/s", REST_REQUESTS
    )
    yield Row("model host, ready for requests", n, timed(lambda: ModelHost(storage.url)), "s", READY_SECONDS)
    seconds = timed(lambda: Registry(storage).promote("model-0", "production", 2, "bench"))
    seconds += timed(lambda: reader.refresh())
    entry = reader.get("model-0")
    assert entry
    assert entry.aliases["production"] == 2
    yield Row("alias moved, until a reader knows it", n, seconds + LOOK_SECONDS, "s", SERVED_SECONDS)
    with requests.counted() as counts:
        publish(storage, "model-0", "vae", step=3, alias=None)
    yield Row("publish a version among N models, requests", n, counts.total(), "", PUBLISH_REQUESTS)


def multiply(storage: Storage, n: int) -> None:
    """Give the catalogue n models: the entry of the one that is published, under other names."""
    reader = CatalogueReader(storage)
    reader.refresh()
    entry = reader.get("model-0")
    assert entry
    shards = {name: Shard(generation=name) for name in SHARDS}
    for i in range(n):
        name = f"model-{i}"
        shards[shard_of(name)].models[name] = entry.model_copy(update={"model": name})
    in_parallel(
        lambda name: write_document(storage, f"catalogue/{name}.json", shards[name].model_dump(mode="json")), SHARDS
    )
    write_document(storage, HEAD, Head(shards={name: name for name in SHARDS}).model_dump(mode="json"))


def measure_publish(server: S3Server, n: int) -> Iterator[Row]:
    """Publish one version more of a model with N versions."""
    storage, requests = opened(server, f"publish-{n}")
    first = publish(storage, "shapes", "vae")

    def copy(number: int) -> None:
        checkpoint = first.checkpoint.model_copy(update={"step": 10**6 + number})
        version = first.model_copy(update={"version": number, "checkpoint": checkpoint})
        write_document(storage, f"models/shapes/versions/{number:08d}.json", version.model_dump(mode="json"))

    in_parallel(copy, range(2, n + 1))
    publish(storage, "shapes", "vae", step=2, alias=None)  # records whose versions the copies are, once
    with requests.counted() as counts:
        version = publish(storage, "shapes", "vae", step=3, alias=None)
    assert version.version == n + 2
    yield Row("publish one more of N versions, requests", n, counts.total(), "", PUBLISH_REQUESTS)
