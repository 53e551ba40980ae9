"""`genmodels up`, `gc`, `doctor`, `keys`: the commands of operators."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli.catalog import open_catalog
from services.cli.catalogue import catalogue_app
from services.cli.keys import keys_app
from services.cli.options import AsJson, MaybeApi, PoolsFile, StorageUrl, Yes, confirm, storage, use_pools
from services.console.output import console, print_json

app = typer.Typer()
PANEL = "Running it for others"
app.add_typer(
    catalogue_app, name="catalogue", help="The index of all models, which lists and hosts read.", rich_help_panel=PANEL
)
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
    logs: Annotated[
        Path | None,
        typer.Option(help="Folder for the platform's own logs; default: .genmodels/logs.", show_default=False),
    ] = None,
    pools: PoolsFile = None,
) -> None:
    """Run the whole platform on this machine until Ctrl-C. It serves only this machine."""
    use_pools(pools)
    from services.local.up import Options
    from services.local.up import up as run

    metrics = {} if metrics_port is None else {"metrics_port": metrics_port}
    options = Options(port=port, api_port=api_port, auth=not no_auth, num_cpus=num_cpus, logs=logs, **metrics)
    run(storage(storage_url), options)


@app.command(rich_help_panel=PANEL)
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Read all runs and versions, not only those that have changed.")
    ] = False,
    yes: Yes = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Remove unreferenced objects from the storage. It lists them first, and asks for confirmation.

    It reads the runs that have changed since the last clean-up; the first clean-up reads all runs. `--all` also finds
    what a process has left that died in the middle of a change.
    """
    from services.console.tables import amount, garbage_table

    with open_catalog(context, api, storage_url) as catalog:
        garbage = catalog.garbage(everything=everything)
        if not garbage.items:
            print("there is nothing to remove")
            if not dry_run:
                garbage.remove()  # it notes which runs need no further look
            return
        summary = f"{len(garbage.items)} items, {amount(sum(item['bytes'] for item in garbage.items))}"
        console().print(garbage_table(garbage.items))
        if dry_run:
            print(f"would remove {summary}")
        elif confirm(f"Remove {summary}?", yes):
            garbage.remove()
            print(f"removed {summary}")


@app.command(rich_help_panel=PANEL)
def doctor(storage_url: StorageUrl = None, as_json: AsJson = False) -> None:
    """Find faults of this installation, and print a remedy for each.

    The command checks the storage, its objects, this machine and the installation.

    The exit code is 1 if there is a problem; a warning is not a problem.
    """
    from dataclasses import asdict

    from genmodels.doctor.checks import examine
    from services.cli import options

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an object's key may have letters that the terminal cannot show
    checks = []
    for check in examine(options.storage_url(storage_url)):
        checks.append(check)
        if not as_json:
            line = f"{check.state:<8} {check.name:<16} {check.text}" + (f". {check.remedy}" if check.remedy else "")
            print("".join(letter if letter.isprintable() else "?" for letter in line), flush=True)
    if as_json:
        print_json([asdict(check) for check in checks])
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)
