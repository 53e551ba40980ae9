"""Commands of those who run it for others: clean-up, keys, the whole platform on one machine."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import AsJson, MaybeApi, StorageUrl, Yes, agreed, service, storage
from services.console.output import console, print_json, tell

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
PANEL = "Running it for others"
app.add_typer(keys_app, name="keys", help="Keys to the services: create, list, revoke.", rich_help_panel=PANEL)


@app.command(rich_help_panel=PANEL)
def up(
    storage_url: StorageUrl = None,
    port: Annotated[int, typer.Option(help="Port of the endpoint.", min=1, max=65535)] = 8000,
    api_port: Annotated[int, typer.Option(help="Port of the job service.", min=1, max=65535)] = 8080,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of this node's metrics; default: 9400.", min=1, max=65535, show_default=False),
    ] = None,
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs for workers; default: all CPUs.", min=1, show_default=False)
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Require no key; serve only this machine.")] = False,
    logs: Annotated[Path, typer.Option(help="Folder for the platform's own logs.")] = Path(".genmodels/logs"),
) -> None:
    """Run the whole platform on this machine until Ctrl-C. It serves only this machine."""
    from services.local.up import Options
    from services.local.up import up as run

    metrics = {} if metrics_port is None else {"metrics_port": metrics_port}
    options = Options(port=port, api_port=api_port, auth=not no_auth, num_cpus=num_cpus, logs=logs, **metrics)
    run(storage(storage_url), options)


@app.command(rich_help_panel=PANEL)
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    yes: Yes = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Remove unreferenced objects from the storage. It lists them first, and asks for confirmation."""
    remote = service(context, api)
    if remote is None:
        from genmodels.registry import gc as cleanup

        plan = cleanup.gc(storage(storage_url))
        found = [{"key": item.key, "bytes": item.bytes, "why": item.why} for item in plan.items]
        if _is_wanted(found, yes, dry_run):
            plan.carry_out()
            print("done")
        return
    with remote:
        if _is_wanted(remote.gc(dry_run=True)["items"], yes, dry_run):
            from services.console.tables import amount

            print(f"done: {amount(remote.gc(dry_run=False)['bytes'])} are free")


@app.command(rich_help_panel=PANEL)
def doctor(storage_url: StorageUrl = None, as_json: AsJson = False) -> None:
    """Find faults of this installation, and say how to mend them.

    The command checks the storage, its objects, this machine and the installation.

    The exit code is 1 if there is a problem; a warning is not a problem.
    """
    from dataclasses import asdict

    from genmodels.doctor.checks import examine
    from services.cli import options

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a key may have letters that the terminal has not
    found = []
    for check in examine(options.storage_url(storage_url)):
        found.append(check)
        if not as_json:
            line = f"{check.state:<8} {check.name:<16} {check.found}" + (f". {check.remedy}" if check.remedy else "")
            print("".join(letter if letter.isprintable() else "?" for letter in line), flush=True)
    if as_json:
        print_json([asdict(check) for check in found])
    if any(check.state == "problem" for check in found):
        raise typer.Exit(1)


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
            help="Only models whose names begin with this; may be repeated. Default: all models.",
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
    tell(f"key {key.id} of {key.name}: {', '.join(key.scopes)}; {models}. It is shown this once:")
    print(token)
    tell("export GENMODELS_KEY=<that>, or send it as: Authorization: Bearer <that>")


@keys_app.command("list")
def keys_list(storage_url: StorageUrl = None, as_json: AsJson = False) -> None:
    """List keys and their scopes, never the keys themselves."""
    from genmodels.keys import Keys
    from services.console.tables import keys_table

    found = Keys(storage(storage_url)).list()
    if as_json:
        print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in found])
    elif found:
        console().print(keys_table(found))
    else:
        print("no keys yet; `genmodels keys create NAME` makes one")


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
    print(f"key {key.id} of {key.name} works no longer")


def _is_wanted(items: list[dict[str, object]], yes: bool, dry_run: bool) -> bool:
    from services.console.tables import amount, garbage_table

    if not items:
        print("there is nothing to remove")
        return False
    size = sum(int(str(item["bytes"])) for item in items)
    console().print(garbage_table(items))
    if dry_run:
        print(f"{len(items)} items, {amount(size)} would go")
        return False
    return agreed(f"Remove {len(items)} items, {amount(size)}?", yes)
