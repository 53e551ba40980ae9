"""Measure the registry: publications of a model that has N versions."""

from __future__ import annotations

from collections.abc import Iterator

from genmodels.registry.store import Registry
from genmodels.storage import write_document
from tests.bench.scale.rows import Row, in_parallel, opened
from tests.support.published_models import publish
from tests.support.s3_server import S3Server

PUBLISH_REQUESTS = 40


def measure_publish(server: S3Server, n: int) -> Iterator[Row]:
    """Publish one version more of a model with N versions."""
    storage, requests = opened(server, f"publish-{n}")
    first = publish(storage, "shapes", "vae")

    def copy(number: int) -> None:
        checkpoint = first.checkpoint.model_copy(update={"step": 10**6 + number})
        version = first.model_copy(update={"version": number, "checkpoint": checkpoint})
        write_document(storage, f"models/shapes/versions/{number:08d}.json", version.model_dump(mode="json"))

    in_parallel(copy, range(2, n + 1))
    with requests.counted() as counts:
        version = publish(storage, "shapes", "vae", step=2, alias=None)
    assert version.version == n + 1
    assert Registry(storage).versions("shapes")[-1] == n + 1
    yield Row("publish version N + 1 of a model, requests", n, counts.total(), "", PUBLISH_REQUESTS)
