"""The command line: `genmodels ...`. Commands import what they need when they run: mistakes are told at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from genmodels.errors import GenmodelsError, SpecError

app = typer.Typer(
    name="genmodels",
    help="Generative models from one YAML to a live endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Storage = Annotated[
    str | None,
    typer.Option(
        envvar="GENMODELS_STORAGE",
        help="file:///folder or s3://bucket/prefix; default: the folder .genmodels here.",
        show_default=False,
    ),
]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A job spec, in YAML or JSON.", show_default=False)]


def main() -> None:
    """Entry point. Exits with 2 for a wrong spec or usage, 1 for what failed, 130 after Ctrl-C."""
    try:
        app()
    except GenmodelsError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SpecError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback()
def _options() -> None:
    """Generative models from one YAML to a live endpoint."""


@app.command()
def validate(
    spec: SpecFile,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Also train two steps, load the result and ask it once.")
    ] = False,
) -> None:
    """Check a job spec."""
    from genmodels.spec import read_spec

    job = read_spec(spec)
    families = ", ".join(model.family for model in job.models)
    print(f"ok: {spec}: job {job.name}, {len(job.models)} model{'s' if len(job.models) > 1 else ''} ({families})")
    if smoke:
        from services.smoke import smoke as try_out

        for model in job.models:
            print(f"{model.name}: ", end="", flush=True)
            print(f"ok: {try_out(model)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of job specs, for editors."""
    from genmodels.spec import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def run(
    spec: SpecFile,
    storage: Storage = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Only this model of the job; may be given again.", show_default=False),
    ] = None,
    port: Annotated[int, typer.Option(help="Where the endpoint listens, on 127.0.0.1.", min=1, max=65535)] = 8000,
    exit: Annotated[
        bool, typer.Option("--exit", help="End after the summary instead of serving until Ctrl-C.")
    ] = False,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve without a key, to this machine alone.")] = False,
    pictures: Annotated[Path, typer.Option(help="Folder for pictures of what the models make.")] = Path("samples"),
) -> None:
    """Train, publish and serve all models of a job on this machine."""
    from genmodels.spec import read_spec

    job = read_spec(spec)
    from services.quickrun import quick_run

    sys.exit(quick_run(job, only or [], _storage(storage), port, exit, no_auth, pictures))


@app.command()
def models(storage: Storage = None) -> None:
    """List published models, their versions and aliases."""
    from rich.console import Console

    from genmodels.registry import Registry
    from services.terminal import registry_table

    Console().print(registry_table(Registry(_storage(storage))))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="e.g. vae-digits@3", show_default=False)],
    alias: Annotated[str, typer.Argument(help="The alias to point at it.")] = "production",
    storage: Storage = None,
) -> None:
    """Point an alias at a version, newer or older."""
    from genmodels.registry import Registry

    registry = Registry(_storage(storage))
    target = registry.resolve(version)
    registry.promote(target.model, alias, target.version, "by hand")
    print(f"{target.model}@{alias} is version {target.version} now")


def _storage(url: str | None) -> Any:
    from genmodels.storage import open_storage

    return open_storage(url or (Path.cwd() / ".genmodels").as_uri())


if __name__ == "__main__":
    main()
