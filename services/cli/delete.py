"""`genmodels delete` and `genmodels data delete`: each reports what it would delete, asks, and deletes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from genmodels.errors import GenmodelsError, ModelNotFound, SpecError
from services.cli.catalog import Catalog, open_catalog
from services.cli.data import data_app
from services.cli.models import PANEL
from services.cli.options import MaybeApi, StorageUrl, Yes, confirm

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def delete(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="JOB|MODEL|MODEL@VERSION|MODEL@ALIAS",
            help="An ended job, a whole model, a version, or an alias.",
            show_default=False,
        ),
    ],
    model: Annotated[bool, typer.Option("--model", help="Delete the model, if a job has the same name.")] = False,
    with_runs: Annotated[
        bool,
        typer.Option("--with-runs", help="With a model: also delete the checkpoints, samples and logs of its runs."),
    ] = False,
    yes: Yes = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Delete an ended job, a whole model, a version, or an alias. It asks for confirmation first."""
    with open_catalog(context, api, storage_url) as catalog:
        deletion = _plan(catalog, name, model, with_runs)
        if not confirm(deletion.question, yes):
            raise typer.Abort
        deletion.run()
    print(deletion.summary)


@data_app.command("delete")
def data_delete(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the dataset, as `genmodels data list` shows it.", show_default=False
        ),
    ],
    yes: Yes = False,
    storage_url: StorageUrl = None,
    api: MaybeApi = None,
) -> None:
    """Delete a dataset with all its contents. Models that were trained on it stay, and are listed."""
    from services.console.tables import amount

    with open_catalog(context, api, storage_url) as catalog:
        contents = catalog.dataset_contents(name)
        size = f"{_count(len(contents['contents']), 'content')}, {amount(contents['bytes'])}"
        if not confirm(f"Delete dataset {name} ({size})? {_trained(contents)}", yes):
            raise typer.Abort
        catalog.delete_dataset(name)
    print(f"dataset {name} is deleted. {_trained(contents)}")
    copies = ", ".join(contents["contents"])
    print(f"Machines that trained on it keep copies in ~/.cache/genmodels/datasets/: {copies}")


@dataclass(frozen=True)
class _Deletion:
    """A deletion that was checked, and waits for the confirmation."""

    question: str
    run: Callable[[], object]
    summary: str  # printed when it is done


def _plan(catalog: Catalog, name: str, model: bool, with_runs: bool) -> _Deletion:
    """Look up what is named.

    Args:
        name: of a job or a model, `model@version`, or `model@alias`.
        model: whether `name` is a model even if a job has the same name.

    Raises:
        GenmodelsError: there is no such thing.
    """
    name, at, reference = name.partition("@")
    if at:
        return _plan_reference(catalog, name, reference)
    is_job = not model and catalog.has_job(name)
    try:
        contents = catalog.model_contents(name)
    except ModelNotFound:
        contents = None
    if is_job and contents:
        raise SpecError(f"{name} is a job and a model: write `genmodels delete {name} --model` for the model")
    if is_job:
        question = f"Delete job {name}, its checkpoints and its logs?"
        return _Deletion(question, lambda: catalog.delete_job(name), f"job {name} is deleted")
    if not contents:
        lists = "`genmodels models` lists" if model else "`genmodels models` and `genmodels jobs` list"
        raise GenmodelsError(f"no {'model' if model else 'job or model'} {name!r}; {lists} all of them")
    runs = _runs(contents["jobs"], with_runs)
    return _Deletion(
        f"Delete model {name} ({_summary(contents)})? {runs}",
        lambda: catalog.delete_model(name, with_runs=with_runs),
        f"model {name} is deleted. {runs}".rstrip(),
    )


def _plan_reference(catalog: Catalog, name: str, reference: str) -> _Deletion:
    if reference in ("latest", "live") or reference.startswith("step-") or ":" in reference:
        raise SpecError(f"{name}@{reference}: name a version by its number, or an alias; `genmodels models` lists them")
    number = catalog.resolve(f"{name}@{reference}").version
    if reference.isdecimal():
        version = f"version {name}@{number}"
        return _Deletion(f"Delete {version}?", lambda: catalog.delete_version(name, number), f"{version} is deleted")
    question = f"Delete alias {name}@{reference}, which names version {number}? The version stays."
    summary = f"alias {name}@{reference} is deleted; version {number} stays"
    return _Deletion(question, lambda: catalog.delete_alias(name, reference), summary)


def _summary(contents: dict[str, Any]) -> str:
    from services.console.tables import amount

    aliases = ", ".join(contents["aliases"])
    parts = [_count(len(contents["versions"]), "version"), f"aliases {aliases}" if aliases else "no alias"]
    return ", ".join([*parts, amount(contents["bytes"])])


def _runs(jobs: list[str], with_runs: bool) -> str:
    if not jobs:
        return ""
    names = ", ".join(jobs)
    if with_runs:
        return f"The checkpoints, samples and logs of its runs are deleted too: {names}."
    return f"The checkpoints, samples and logs of its runs stay: {names}; --with-runs deletes them too."


def _trained(contents: dict[str, Any]) -> str:
    if not contents["runs"]:
        return "No run was trained on it."
    versions = ", ".join(contents["versions"]) or "none"
    stays = "their checkpoints, versions and samples stay until you delete them"
    return f"Runs trained on it: {', '.join(contents['runs'])}; versions: {versions}; {stays}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
