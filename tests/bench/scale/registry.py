"""Measure the registry: a catalogue of N models, and publications of a model that has N versions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import httpx

from genmodels.registry.catalogue import HEAD, SHARDS, CatalogueReader, Head, Shard, shard_of
from genmodels.registry.store import Registry
from genmodels.storage import Storage, write_document
from services.gateway.model_host import ModelHost
from services.http.middleware import LOOPBACK
from services.jobs.app import create_app
from tests.bench.scale.rows import Row, in_parallel, opened, timed
from tests.support.asgi_server import served
from tests.support.published_models import publish
from tests.support.s3_server import S3Server

PUBLISH_REQUESTS = 40
REST_REQUESTS = 2.0  # a second, of a reader of the catalogue
SERVED_SECONDS = 2.0  # from an alias that moves to a reader that knows it
READY_SECONDS = 30.0  # of a new replica
LIST_MS = 50.0  # the median
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
    yield from list_requests(storage, n)
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


def list_requests(storage: Storage, n: int) -> Iterator[Row]:
    """Ask a job service for pages of its models."""
    app = create_app(storage, keys=None, hosts=LOOPBACK)
    with served(app) as url, httpx.Client(base_url=url) as client:

        def ask(path: str) -> float:
            return timed(lambda: client.get(path).raise_for_status())

        yield Row("GET /v1/models, the first request", n, 1000 * ask("/v1/models"), "ms")
        listed = statistics.median(ask("/v1/models?limit=100") for _ in range(LOOKS))
        yield Row("GET /v1/models, a page of 100", n, 1000 * listed, "ms", LIST_MS)
        one = statistics.median(ask("/v1/models/model-0") for _ in range(LOOKS))
        yield Row("GET /v1/models/model-0", n, 1000 * one, "ms", LIST_MS)


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
