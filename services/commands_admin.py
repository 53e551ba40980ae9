"""Commands of those who run it for others: clean-up, keys, the whole platform on one machine."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.options import AsJson, MaybeApi, StorageUrl, Yes, agreed, console, print_json, service, storage, tell

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
PANEL = "Running it for others"
app.add_typer(keys_app, name="keys", help="Keys to the services: create, list, revoke.", rich_help_panel=PANEL)


@app.command(rich_help_panel=PANEL)
def up(
    storage_url: StorageUrl = None,
    port: Annotated[int, typer.Option(help="Where the endpoint listens.", min=1, max=65535)] = 8000,
    api_port: Annotated[int, typer.Option(help="Where the job service listens.", min=1, max=65535)] = 8080,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Where the metrics of this node are.", min=1, max=65535, show_default=False),
    ] = None,
    num_cpus: Annotated[
        int | None, typer.Option(help="CPUs for workers; default: all.", min=1, show_default=False)
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask nobody for a key.")] = False,
    logs: Annotated[Path, typer.Option(help="Folder for the logs of the platform itself.")] = Path(".genmodels/logs"),
) -> None:
    """Run the whole platform on this machine. It serves this machine alone, until Ctrl-C."""
    from services.up import Options
    from services.up import up as run

    metrics = {} if metrics_port is None else {"metrics_port": metrics_port}
    options = Options(port=port, api_port=api_port, auth=not no_auth, num_cpus=num_cpus, logs=logs, **metrics)
    run(storage(storage_url), options)


@app.command(rich_help_panel=PANEL)
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    yes: Yes = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Remove what nothing names any more. It says first what that would free, and asks."""
    remote = service(context, api)
    if remote is None:
        from genmodels import cleanup

        plan = cleanup.gc(storage(storage_url))
        found = [{"key": item.key, "bytes": item.bytes, "why": item.why} for item in plan.items]
        if _is_wanted(found, yes, dry_run):
            plan.carry_out()
            print("done")
        return
    with remote:
        if _is_wanted(remote.gc(dry_run=True)["items"], yes, dry_run):
            from services.tables import amount

            print(f"done: {amount(remote.gc(dry_run=False)['bytes'])} are free")


@app.command(rich_help_panel=PANEL)
def doctor(storage_url: StorageUrl = None, as_json: AsJson = False) -> None:
    """Look for what is wrong here, and say what to do.

    It looks at the storage, what is in it, this machine and the installation.

    Exit code 1 if there is a problem; warnings are none.
    """
    from dataclasses import asdict

    from genmodels.doctor import examine
    from services import options

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
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, e.g. alice or ci.", show_default=False)],
    scope: Annotated[
        list[str],
        typer.Option(
            metavar="SCOPE",
            help="generate (ask models), submit (jobs, datasets, aliases), admin (all, also delete and gc); "
            "may be given again.",
        ),
    ] = ["generate", "submit"],  # noqa: B006  typer copies it
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX",
            help="Only models whose names begin so; may be given again. Default: all.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        int | None, typer.Option(metavar="N", help="At most so many requests a minute. Default: any number.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="At most so many requests at once. Default: any number.")
    ] = None,
    storage_url: StorageUrl = None,
) -> None:
    """Make a key. It is printed this once, alone on standard output; only its hash is stored."""
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
    """List keys: what each may do, never the keys themselves."""
    from genmodels.keys import Keys
    from services.tables import keys_table

    found = Keys(storage(storage_url)).list()
    if as_json:
        print_json([key.model_dump(mode="json", exclude={"sha256"}) for key in found])
    elif found:
        console().print(keys_table(found))
    else:
        print("no keys yet; `genmodels keys create NAME` makes one")


@keys_app.command("revoke")
def keys_revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `genmodels keys list` shows it.", show_default=False)],
    storage_url: StorageUrl = None,
) -> None:
    """End a key. Services notice within seconds."""
    from genmodels.keys import Keys

    key = Keys(storage(storage_url)).revoke(id)
    print(f"key {key.id} of {key.name} works no longer")


def _is_wanted(items: list[dict[str, object]], yes: bool, dry_run: bool) -> bool:
    from services.tables import amount, garbage_table

    if not items:
        print("there is nothing to remove")
        return False
    size = sum(int(str(item["bytes"])) for item in items)
    console().print(garbage_table(items))
    if dry_run:
        print(f"{len(items)} items, {amount(size)} would go")
        return False
    return agreed(f"Remove {len(items)} items, {amount(size)}?", yes)
