"""The stored models, datasets and ended jobs, for the commands: read from a storage, or through a job service.

A command is given a Catalog, and does the same with either of its two implementations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from genmodels.errors import JobNotFound
from services.cli import options
from services.cli.upload import open_upload
from services.console.output import console

if TYPE_CHECKING:
    from genmodels.registry.versions import Version
    from genmodels.storage import Storage
    from services.client.jobs import Client

Json = dict[str, Any]


@dataclass(frozen=True)
class Garbage:
    """Objects that nothing references, each with `key`, `bytes` and `why`.

    `remove` removes them, except those that are now in use.
    """

    items: list[Json]
    remove: Callable[[], object]


class Catalog(Protocol):
    """The stored objects, and the operations on them. The JSON objects are those of the job API."""

    def models(self) -> list[Json]:
        """Return the published models, as GET /v1/models lists them."""

    def resolve(self, name: str) -> Version:
        """Return the version that a name means: `m@3`, `m@latest`, `m@alias`, or `m` (its alias production).

        Raises:
            ModelNotFound: there is no such model, alias or version.
        """

    def promote(self, version: Version, alias: str) -> None:
        """Point an alias of the version's model at the version."""

    def fetch(self, version: Version, folder: Path) -> None:
        """Download a version's files into an empty folder, and verify them.

        Raises:
            CheckpointError: a file is damaged.
        """

    def delete_version(self, model: str, number: int) -> None: ...

    def delete_alias(self, model: str, alias: str) -> None: ...

    def model_contents(self, model: str) -> Json:
        """Return what `delete_model` would remove.

        Raises:
            ModelNotFound: nothing of this model is stored.
        """

    def delete_model(self, model: str, *, with_runs: bool) -> None: ...

    def has_job(self, job: str) -> bool: ...

    def delete_job(self, job: str) -> None: ...

    def datasets(self) -> list[Json]:
        """Return the built-in and the added datasets, as GET /v1/datasets lists them."""

    def add_dataset(
        self, name: str, path: Path, *, image_size: int | None, channels: int | None, replace: bool
    ) -> list[str]:
        """Add a text file, or pictures from a folder or a zip; return notes on what was read.

        Raises:
            DatasetExists: the name means another content, and `replace` is false.
        """

    def dataset_contents(self, name: str) -> Json:
        """Return what `delete_dataset` would remove, and what was trained on it."""

    def delete_dataset(self, name: str) -> None: ...

    def garbage(self, *, everything: bool) -> Garbage:
        """Find the objects that nothing references."""


@contextlib.contextmanager
def open_catalog(context: typer.Context, api: str | None, storage_url: str | None) -> Iterator[Catalog]:
    """Open the job service where one is named, else the storage."""
    client = options.service(context, api)
    if client is None:
        yield StorageCatalog(options.storage(storage_url))
        return
    with client:
        yield ServiceCatalog(client)


class StorageCatalog:
    """A catalog read from a storage that this machine can open."""

    def __init__(self, storage: Storage) -> None:
        from genmodels.registry.store import Registry

        self.storage, self.registry = storage, Registry(storage)

    def models(self) -> list[Json]:
        from genmodels.registry.catalogue import HEAD, CatalogueReader
        from services.jobs.model_views import model_view

        if not self.storage.exists(HEAD) and not self.registry.models():
            return []  # without the catalogue that a reader builds: a list writes nothing to an empty storage
        reader = CatalogueReader(self.storage)
        reader.refresh()
        return [model_view(entry) for entry in map(reader.get, reader.models()) if entry]

    def resolve(self, name: str) -> Version:
        return self.registry.resolve(name)

    def promote(self, version: Version, alias: str) -> None:
        self.registry.promote(version.model, alias, version.version, "by hand")

    def fetch(self, version: Version, folder: Path) -> None:
        self.registry.fetch(version, folder)

    def delete_version(self, model: str, number: int) -> None:
        from genmodels.registry.removal import delete_version

        delete_version(self.registry, model, number)

    def delete_alias(self, model: str, alias: str) -> None:
        self.registry.remove_alias(model, alias)

    def model_contents(self, model: str) -> Json:
        from genmodels.registry.removal import model_contents

        return asdict(model_contents(self.storage, model))

    def delete_model(self, model: str, *, with_runs: bool) -> None:
        from genmodels.registry.removal import delete_model

        delete_model(self.storage, model, with_runs=with_runs)

    def has_job(self, job: str) -> bool:
        from genmodels.runs.jobs import Jobs

        return Jobs(self.storage).is_known(job)

    def delete_job(self, job: str) -> None:
        from genmodels.runs.jobs import Jobs

        Jobs(self.storage).delete(job)

    def datasets(self) -> list[Json]:
        from services.jobs.model_views import dataset_views

        return dataset_views(self.storage)

    def add_dataset(
        self, name: str, path: Path, *, image_size: int | None, channels: int | None, replace: bool
    ) -> list[str]:
        from genmodels.data import uploads

        dataset, _ = uploads.add(self.storage, name, path, image_size, channels, replace=replace)  # type: ignore[arg-type]
        return dataset.notes

    def dataset_contents(self, name: str) -> Json:
        from genmodels.registry.removal import dataset_contents

        return asdict(dataset_contents(self.storage, name))

    def delete_dataset(self, name: str) -> None:
        from genmodels.registry.removal import delete_dataset

        delete_dataset(self.storage, name)

    def garbage(self, *, everything: bool) -> Garbage:
        from genmodels.registry import gc

        plan = gc.gc(self.storage, everything=everything)
        items = [{"key": item.key, "bytes": item.bytes, "why": item.why} for item in plan.items]
        return Garbage(items, plan.carry_out)


class ServiceCatalog:
    """A catalog behind a job service, which checks the caller's key."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.models, self.fetch, self.datasets = client.models, client.fetch, client.datasets
        self.delete_version, self.delete_alias, self.delete_job = (
            client.delete_version,
            client.delete_alias,
            client.delete_job,
        )

    def resolve(self, name: str) -> Version:
        return self.client.version(*self.client.resolve(name))

    def promote(self, version: Version, alias: str) -> None:
        self.client.promote(version.model, alias, version.version)

    def model_contents(self, model: str) -> Json:
        return self.client.delete_model(model, dry_run=True)

    def delete_model(self, model: str, *, with_runs: bool) -> None:
        self.client.delete_model(model, with_runs=with_runs)

    def has_job(self, job: str) -> bool:
        try:
            self.client.job(job)
        except JobNotFound:
            return False
        return True

    def add_dataset(
        self, name: str, path: Path, *, image_size: int | None, channels: int | None, replace: bool
    ) -> list[str]:
        with open_upload(path) as file, console(stderr=True).status("Sending"):
            dataset = self.client.add_dataset(name, file, replace=replace, image_size=image_size, channels=channels)
        return list(dataset["notes"])

    def dataset_contents(self, name: str) -> Json:
        return self.client.delete_dataset(name, dry_run=True)

    def delete_dataset(self, name: str) -> None:
        self.client.delete_dataset(name)

    def garbage(self, *, everything: bool) -> Garbage:
        remove = partial(self.client.gc, dry_run=False, everything=everything)
        return Garbage(self.client.gc(dry_run=True, everything=everything)["items"], remove)
