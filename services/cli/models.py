"""Commands on what is stored (models, datasets, keys): through a job service where one is named, else directly."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genmodels.errors import GenmodelsError, JobNotFound
from genmodels.storage import encode_floats
from services.cli.data import data_app
from services.cli.options import AsJson, MaybeApi, StorageUrl, service, storage
from services.console.output import console, print_json

if TYPE_CHECKING:
    from genmodels.registry.store import Version

app = typer.Typer()
PANEL = "What is stored"
app.add_typer(
    data_app, name="data", help="Datasets of your own, in the storage: add, list, delete.", rich_help_panel=PANEL
)

VersionName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL@VERSION",
        help="A version, e.g. vae-digits@3, vae-digits@latest or vae-digits@production.",
        show_default=False,
    ),
]


@app.command(rich_help_panel=PANEL)
def models(context: typer.Context, storage_url: StorageUrl = None, api: MaybeApi = None) -> None:
    """List published models, their versions and aliases."""
    from services.console.tables import models_table, registry_table

    remote = service(context, api)
    if remote is None:
        from genmodels.registry.store import Registry

        console().print(registry_table(Registry(storage(storage_url))))
        return
    with remote:
        console().print(models_table(remote.models()))


@app.command(rich_help_panel=PANEL)
def promote(
    context: typer.Context,
    version: VersionName,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Alias to move.")] = "production",
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Point an alias at a version, newer or older. Serving follows within seconds."""
    remote = service(context, api)
    if remote is None:
        from genmodels.registry.store import Registry

        registry = Registry(storage(storage_url))
        target = registry.resolve(version)
        registry.promote(target.model, alias, target.version, "by hand")
        model, number = target.model, target.version
    else:
        with remote:
            model, number = remote.resolve(version)
            remote.promote(model, alias, number)
    print(f"{model}@{alias} is version {number} now")


@app.command(rich_help_panel=PANEL)
def pull(
    context: typer.Context,
    version: VersionName,
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="Folder to create; default: MODEL-VERSION in the current folder.", show_default=False
        ),
    ] = None,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Download the files of a version. Each file is verified by its sha256."""
    from services.console.tables import amount

    remote = service(context, api)
    if remote is None:
        from genmodels.registry.store import Registry

        registry = Registry(storage(storage_url))
        found = registry.resolve(version)
        with _new_folder(folder, found) as (path, part):
            registry.fetch(found, part)
    else:
        with remote:
            found = remote.version(*remote.resolve(version))
            with _new_folder(folder, found) as (path, part):
                remote.fetch(found, part)
    size = sum(file.size for file in found.files.values())
    print(f"{found.name}: {len(found.files)} files, {amount(size)}, in {path}")


@app.command(rich_help_panel=PANEL)
def evaluate(
    version: VersionName,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Use all validation data and many more draws; this takes minutes.")
    ] = False,
    storage_url: StorageUrl = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a version on its data, and store the result with it. This always opens the storage."""
    import time

    from genmodels.checkpoint import scratch_folder
    from genmodels.registry import evaluations
    from genmodels.registry.evaluate import evaluate as evaluate_version
    from genmodels.registry.store import Registry
    from genmodels.runs.jobs import Jobs
    from genmodels.runs.store import Run
    from services.console.tables import evaluation_table

    store = storage(storage_url)
    registry = Registry(store)
    found = registry.resolve(version)
    try:
        spec = Jobs(store).model_spec(found.job, found.model)
    except JobNotFound:
        raise GenmodelsError(f"{found.name}: job {found.job} was deleted, so its data is not known any more") from None
    with scratch_folder() as name, console(stderr=True).status(f"Evaluating {found.name}"):
        registry.fetch(found, Path(name))
        began = time.monotonic()
        result = evaluate_version(
            Run(store, found.job, found.model), found.checkpoint, spec, found.lineage, Path(name), thorough=thorough
        )
    evaluation = evaluations.record(registry, found, result, thorough=thorough, seconds=time.monotonic() - began)
    if as_json:
        print_json(encode_floats(evaluation.model_dump(mode="json")))
    else:
        console().print(evaluation_table(evaluation))


@contextmanager
def _new_folder(folder: Path | None, version: Version) -> Iterator[tuple[Path, Path]]:
    """The folder to make, and the one to fill meanwhile: it appears when it is complete, or not at all."""
    path = folder or Path(f"{version.model}-{version.version}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GenmodelsError(f"{path} is there and not empty; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            part = Path(scratch) / "files"
            part.mkdir()
            yield path, part
            part.replace(path)
    except OSError as error:
        raise GenmodelsError(f"{path}: cannot be written: {error.strerror}") from None
