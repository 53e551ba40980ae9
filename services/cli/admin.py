"""Commands of those who run it for others: clean-up, keys, the whole platform on one machine."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli.keys import keys_app
from services.cli.options import AsJson, MaybeApi, StorageUrl, Yes, agreed, service, storage
from services.console.output import console, print_json

app = typer.Typer()
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
            line = f"{check.state:<8} {check.name:<16} {check.text}" + (f". {check.remedy}" if check.remedy else "")
            print("".join(letter if letter.isprintable() else "?" for letter in line), flush=True)
    if as_json:
        print_json([asdict(check) for check in found])
    if any(check.state == "problem" for check in found):
        raise typer.Exit(1)


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
