"""Options that several commands share, and how commands open a storage or a service and ask for confirmation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genmodels.errors import SpecError

if TYPE_CHECKING:
    from genmodels.spec.sections import JobSpec
    from genmodels.storage import Storage
    from services.client.jobs import Client


SpecFile = Annotated[
    Path,
    typer.Argument(metavar="SPEC", help="A job spec, in YAML or JSON; - reads standard input.", show_default=False),
]
StorageUrl = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        envvar="GENMODELS_STORAGE",
        help="file:///folder or s3://bucket/prefix; default: .genmodels in the current folder.",
        show_default=False,
    ),
]
PoolsFile = Annotated[
    Path | None,
    typer.Option(
        "--pools",
        metavar="FILE",
        envvar="GENMODELS_POOLS",
        help="The pools of model hosts; default: one pool, named default.",
        show_default=False,
    ),
]
Api = Annotated[
    str,
    typer.Option(
        "--api",
        metavar="URL",
        envvar="GENMODELS_API",
        help="URL of the job service; the key is read from GENMODELS_KEY.",
    ),
]
MaybeApi = Annotated[
    str | None,
    typer.Option(
        "--api",
        metavar="URL",
        envvar="GENMODELS_API",
        help="Use this job service (key in GENMODELS_KEY) instead of opening the storage.",
        show_default=False,
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="Id of a job, as `genmodels submit` prints it.", show_default=False)
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="MODEL", help="Only this model of the job; may be repeated.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def read_document(spec: Path) -> tuple[bytes, str]:
    """Return the bytes of a job spec and the name that errors give it; `-` reads standard input.

    Raises:
        SpecError: the file cannot be read, or is larger than any spec.
    """
    from genmodels.schema import yaml

    if str(spec) == "-":
        data, source = sys.stdin.buffer.read(yaml.MAX_BYTES + 1), "standard input"
    else:
        data, source = yaml.read_file(spec), str(spec)
    yaml.check_size(data, source)
    return data, source


def read_job(spec: Path, url: str | None) -> tuple[JobSpec, str, Storage]:
    """Read a job spec; return it, the name that errors give it, and the storage, whose datasets it may name.

    Raises:
        SpecError: the file cannot be read, or is not a valid spec.
    """
    from genmodels.data import added
    from genmodels.spec.parse import parse_spec

    data, source = read_document(spec)
    opened = storage(url)
    return parse_spec(data, source, spec.absolute().parent, added.Kinds(opened)), source, opened


def client(api: str) -> Client:
    import os

    from services.client.jobs import Client

    return Client(api, os.environ.get("GENMODELS_KEY") or None)


def service(context: typer.Context, api: str | None) -> Client | None:
    """Return a client of the job service, or None to open the storage: a typed --storage overrides GENMODELS_API."""
    typed = context.get_parameter_source("storage_url")
    if api is None or (typed is not None and typed.name == "COMMANDLINE" and _from_environment(context)):
        return None
    return client(api)


def storage(url: str | None) -> Storage:
    """Open a storage that the command may only read; refuse a storage of another format at once."""
    from genmodels.storage import open_storage, read_marker

    opened = open_storage(storage_url(url))
    read_marker(opened)
    return opened


def storage_url(url: str | None) -> str:
    if url:
        return url
    try:
        return (Path.cwd() / ".genmodels").as_uri()
    except FileNotFoundError:
        raise SpecError("the current folder is gone; change to another one, or name a storage: --storage") from None


def confirm(question: str, yes: bool, option: str = "--yes") -> bool:
    """Ask for a confirmation before an action that cannot be undone.

    Args:
        yes: agree without asking.
        option: the option that agrees, for the error.

    Raises:
        SpecError: there is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise SpecError(f"{question} There is no terminal to ask on: add {option}")
    return typer.confirm(question, err=True)


def _from_environment(context: typer.Context) -> bool:
    source = context.get_parameter_source("api")
    return source is not None and source.name == "ENVIRONMENT"


def use_pools(path: Path | None) -> None:
    """Let this process and those that it starts, some of them in other folders, read this file of pools."""
    if path:
        os.environ["GENMODELS_POOLS"] = str(path.absolute())
