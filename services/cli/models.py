"""`genmodels models`, `promote`, `pull`, `evaluate`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genmodels.errors import GenmodelsError, JobNotFound
from genmodels.storage import encode_floats
from services.cli.catalog import open_catalog
from services.cli.data import data_app
from services.cli.options import AsJson, MaybeApi, StorageUrl, storage
from services.console.output import console, print_json

if TYPE_CHECKING:
    from genmodels.registry.versions import Version

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
    from services.console.tables import models_table

    with open_catalog(context, api, storage_url) as catalog:
        console().print(models_table(catalog.models()))


@app.command(rich_help_panel=PANEL)
def promote(
    context: typer.Context,
    version: VersionName,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Alias to move.")] = "production",
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Point an alias at a version, also at an older one. Serving follows within seconds."""
    with open_catalog(context, api, storage_url) as catalog:
        target = catalog.resolve(version)
        catalog.promote(target, alias)
    print(f"{target.model}@{alias} is version {target.version} now")


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

    with open_catalog(context, api, storage_url) as catalog:
        target = catalog.resolve(version)
        with _new_folder(folder, target) as (path, part):
            catalog.fetch(target, part)
    size = sum(file.size for file in target.files.values())
    print(f"{target.name}: {len(target.files)} files, {amount(size)}, in {path}")


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
    from genmodels.registry.evaluate import evaluate as evaluate_version
    from genmodels.registry.store import Registry
    from genmodels.runs.jobs import Jobs
    from genmodels.runs.store import Run
    from services.console.tables import evaluation_table

    store = storage(storage_url)
    registry = Registry(store)
    target = registry.resolve(version)
    try:
        spec = Jobs(store).model_spec(target.job, target.model)
    except JobNotFound:
        raise GenmodelsError(f"{target.name}: job {target.job} was deleted, so its data is unknown") from None
    with scratch_folder() as name, console(stderr=True).status(f"Evaluating {target.name}"):
        registry.fetch(target, Path(name))
        began = time.monotonic()
        result = evaluate_version(
            Run(store, target.job, target.model), target.checkpoint, spec, target.lineage, Path(name), thorough=thorough
        )
    evaluation = registry.record_evaluation(target, result, thorough=thorough, seconds=time.monotonic() - began)
    if as_json:
        print_json(encode_floats(evaluation.model_dump(mode="json")))
    else:
        console().print(evaluation_table(evaluation))


@contextmanager
def _new_folder(folder: Path | None, version: Version) -> Iterator[tuple[Path, Path]]:
    """Yield the path of the new folder, and a folder to fill, which is moved there when it is complete."""
    path = folder or Path(f"{version.model}-{version.version}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GenmodelsError(f"{path} exists and is not empty; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            part = Path(scratch) / "files"
            part.mkdir()
            yield path, part
            part.replace(path)
    except OSError as error:
        raise GenmodelsError(f"{path}: cannot be written: {error.strerror}") from None
