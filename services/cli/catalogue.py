"""`genmodels catalogue`: the index of all models in a storage."""

from __future__ import annotations

import typer

from services.cli.options import StorageUrl, storage

catalogue_app = typer.Typer(no_args_is_help=True)


@catalogue_app.callback()
def catalogue() -> None:
    """Repair the index of all models. This always opens the storage."""


@catalogue_app.command()
def rebuild(storage_url: StorageUrl = None) -> None:
    """Build the catalogue again from all versions and aliases.

    Publishing and promoting keep it up to date, and the job service repairs it. Use this after objects were restored or
    removed by hand. It may run at any time: nothing stops meanwhile.
    """
    from genmodels.registry.catalogue import Catalogue

    count = Catalogue(storage(storage_url)).rebuild()
    print(f"the catalogue has {count} models")
