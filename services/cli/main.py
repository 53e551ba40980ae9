"""The command line: `genmodels ...`. A command imports what it needs when it runs, so mistakes are reported at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup

    from genmodels import __version__
    from genmodels.errors import GenmodelsError, SpecError
    from services.cli import admin, delete, jobs, models
    from services.cli.options import PoolsFile, SpecFile, StorageUrl, read_job, use_pools
    from services.cluster.environment import isolate_process
except KeyboardInterrupt:  # Ctrl-C before `main` can handle it
    sys.exit(130)

PANEL = "On this machine alone"


class Grouped(TyperGroup):
    """List commands in the help under the headings of their panels, which typer's plain help leaves out."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        width = formatter.width - 6 - max(map(len, self.commands))
        for name, command in self.commands.items():
            panel = getattr(command, "rich_help_panel", None)
            panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append(
                (name, command.get_short_help_str(width))
            )
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    name="genmodels",
    cls=Grouped,
    help="Train generative models from one YAML, and serve them at a live endpoint.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


UsageError: Any = typer.BadParameter.__base__  # of the copy of click in typer


def main() -> None:
    """Run a command. Exit with 2 for a wrong spec or usage, 1 for another failure, 130 after Ctrl-C."""
    try:
        isolate_process()
        code = app(prog_name="genmodels", standalone_mode=False) or 0
        if sys.stdout:
            sys.stdout.flush()
        sys.exit(code)
    except GenmodelsError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SpecError) else 1)
    except UsageError as error:
        print(_usage(error), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python tries once more at its end
        sys.exit(1)
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _usage(error: Any) -> str:
    """Describe in one line what is wrong with the arguments; without any arguments, return the whole help."""
    message = str(error.format_message())
    if "\n" in message:
        return message
    problem = message.removesuffix(".").replace("Input should be", "expected").replace("Value error, ", "")
    command = error.ctx.command_path if error.ctx else "genmodels"
    end = "" if problem.endswith("?") else ";"
    return f"error: {problem[:1].lower()}{problem[1:]}{end} `{command} --help` shows the usage"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"genmodels {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train generative models from one YAML, and serve them at a live endpoint."""


@app.command(rich_help_panel=PANEL)
def run(
    spec: SpecFile,
    storage_url: StorageUrl = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Only this model of the job; may be repeated.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the endpoint on 127.0.0.1.", min=1, max=65535)] = 8000,
    exit: Annotated[
        bool, typer.Option("--exit", help="End after the summary instead of serving until Ctrl-C.")
    ] = False,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Require no key; serve only this machine.")] = False,
    pictures: Annotated[Path, typer.Option(help="Folder for the models' pictures and training curves.")] = Path(
        "samples"
    ),
    pools: PoolsFile = None,
) -> None:
    """Train, publish and serve all models of a job on this machine."""
    use_pools(pools)
    job, _, store = read_job(spec, storage_url)
    from services.local.run import quick_run

    sys.exit(quick_run(job, only or [], store, port, exit, no_auth, pictures))


@app.command(rich_help_panel=PANEL)
def validate(
    spec: SpecFile,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Also train two steps, load the result and send one request to it.")
    ] = False,
    storage_url: StorageUrl = None,
    pools: PoolsFile = None,
) -> None:
    """Check a job spec. The pools that it names are checked only against a given file of pools."""
    use_pools(pools)
    job, source, store = read_job(spec, storage_url)
    from genmodels.preflight import trainable
    from genmodels.preflight.check import check_job
    from genmodels.sizing.machine import memory_limit
    from services.gateway.pool_config import read_pools

    try:
        checked = check_job(job, store, pools=read_pools().memory if pools else None)
    except SpecError as error:
        raise SpecError(*(f"{source}: {problem}" for problem in error.problems)) from None
    job = checked.job
    families = ", ".join(model.family for model in job.models)
    print(f"ok: {source}: job {job.name}, {len(job.models)} model{'s' if len(job.models) > 1 else ''} ({families})")
    for name, notes in checked.notes.items():
        for note in notes:
            print(f"{name}: {note}")
    for model in job.models:
        if problem := trainable.refusal(model, checked.facts[model.name].info, memory_limit(), model.world_sizes[0]):
            print(f"{model.name}: this machine cannot train it: {problem}")
    if smoke:
        from services.local.smoke import smoke as try_out

        for model in job.models:
            print(f"{model.name}: ", end="", flush=True)
            print(f"ok: {try_out(model, store)}")


@app.command(rich_help_panel=PANEL)
def schema() -> None:
    """Print the JSON Schema of job specs, for editors."""
    from genmodels.spec.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


for part in (jobs, models, delete, admin):
    app.add_typer(part.app)


if __name__ == "__main__":
    main()
