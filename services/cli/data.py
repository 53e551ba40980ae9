"""`genmodels data add` and `genmodels data list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genmodels.errors import DatasetExists, SpecError
from services.cli.catalog import open_catalog
from services.cli.options import AsJson, MaybeApi, StorageUrl, confirm
from services.console.output import console, print_json, tell

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@data_app.command("add")
def data_add(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the dataset in specs: `data: {dataset: NAME}`.", show_default=False
        ),
    ],
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A text file, a folder of pictures, or a zip of a folder.", show_default=False
        ),
    ],
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square pictures, in pixels; default: 32.", show_default=False)
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="Channels: 1 (grey) or 3 (colour); default: 1 if every picture is grey, else 3.", show_default=False
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a dataset of this name without asking.")] = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Add a text or pictures to the storage, after a check. Specs name the dataset on every machine."""
    if channels not in (None, 1, 3):
        raise SpecError(f"--channels: got {channels}, expected 1 (grey) or 3 (colour)")
    with open_catalog(context, api, storage_url) as catalog:

        def add(replace: bool) -> list[str]:
            return catalog.add_dataset(name, path, image_size=image_size, channels=channels, replace=replace)

        try:
            notes = add(replace)
        except DatasetExists as error:
            question = f"{error}. Replace it? Submitted jobs keep the content that they had."
            if not confirm(question, False, "--replace"):
                raise typer.Abort from None
            notes = add(True)
    print(f"{name}: {'; '.join(notes)}")
    tell(f"in a spec: data: {{dataset: {name}}}")


@data_app.command("list")
def data_list(
    context: typer.Context, storage_url: StorageUrl = None, api: MaybeApi = None, as_json: AsJson = False
) -> None:
    """List the datasets that a spec may name: built-in and added."""
    from services.console.tables import datasets_table

    with open_catalog(context, api, storage_url) as catalog:
        datasets = catalog.datasets()
    if as_json:
        print_json(datasets)
    else:
        console().print(datasets_table(datasets))
