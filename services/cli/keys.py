"""`genmodels keys create`, `list` and `revoke`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import AsJson, StorageUrl, storage
from services.console.output import console, print_json, tell

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@keys_app.command("create")
def keys_create(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Owner of the key, e.g. alice or ci.", show_default=False)
    ],
    scope: Annotated[
        list[str],
        typer.Option(
            metavar="SCOPE",
            help="generate (use models), submit (jobs, datasets, aliases), admin (everything, also delete and gc); "
            "may be repeated.",
        ),
    ] = ["generate", "submit"],  # noqa: B006  typer copies it
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX",
            help="Only models and datasets whose names begin with this; may be repeated. Default: all models.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        int | None, typer.Option(metavar="N", help="Largest number of requests in a minute. Default: no limit.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Largest number of requests at the same time. Default: no limit.")
    ] = None,
    storage_url: StorageUrl = None,
) -> None:
    """Create a key. It is printed once, alone on standard output; only its hash is stored."""
    from genmodels.keys import Keys

    keys = Keys(storage(storage_url))
    scopes, prefixes = tuple(scope), tuple(prefix or ())
    key, token = keys.create(name, scopes, prefixes, rate=rate, concurrency=concurrency)  # type: ignore[arg-type]
    models = "all models" if not key.prefixes else "models named " + ", ".join(f"{p}..." for p in key.prefixes)
    tell(f"key {key.id} of {key.name}: {', '.join(key.scopes)}; {models}. The key is shown only this once:")
    print(token)
    tell("export GENMODELS_KEY=<key>, or send the header: Authorization: Bearer <key>")


@keys_app.command("list")
def keys_list(storage_url: StorageUrl = None, as_json: AsJson = False) -> None:
    """List keys and their scopes, never the keys themselves."""
    from genmodels.keys import Keys
    from services.console.tables import keys_table

    keys = Keys(storage(storage_url)).list()
    if as_json:
        print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in keys])
    elif keys:
        console().print(keys_table(keys))
    else:
        print("no keys yet; `genmodels keys create NAME` creates one")


@keys_app.command("revoke")
def keys_revoke(
    id: Annotated[
        str, typer.Argument(metavar="ID", help="Id of the key, as `genmodels keys list` shows it.", show_default=False)
    ],
    storage_url: StorageUrl = None,
) -> None:
    """Revoke a key. Services refuse it within 5 seconds."""
    from genmodels.keys import Keys

    key = Keys(storage(storage_url)).revoke(id)
    print(f"key {key.id} of {key.name} is revoked")
