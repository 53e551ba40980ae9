"""`genmodels delete` and `genmodels data delete`: each looks first, says what goes and what stays, and asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genmodels.errors import GenmodelsError, JobNotFound, ModelNotFound, SpecError
from services.cli.data import data_app
from services.cli.models import PANEL
from services.cli.options import MaybeApi, StorageUrl, Yes, agreed, service, storage

if TYPE_CHECKING:
    from genmodels.storage import Storage
    from services.client.jobs import Client

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def delete(
    context: typer.Context,
    what: Annotated[
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
    remote = service(context, api)
    place = _Remote(remote) if remote else _Local(storage(storage_url))
    with place:
        question, work, done = _plan(place, what, model, with_runs)
        if not agreed(question, yes):
            raise typer.Abort
        work()
    print(done)


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

    remote = service(context, api)
    place = _Remote(remote) if remote else _Local(storage(storage_url))
    with place:
        found = place.dataset(name)
        size = f"{_count(len(found['contents']), 'content')}, {amount(found['bytes'])}"
        if not agreed(f"Delete dataset {name} ({size})? {_trained(found)}", yes):
            raise typer.Abort
        place.delete_dataset(name)
    print(f"dataset {name} is deleted. {_trained(found)}")
    print("Machines that trained on it keep copies in ~/.cache/genmodels/datasets/: " + ", ".join(found["contents"]))


class _Local:
    """What the commands need of a storage."""

    def __init__(self, store: Storage) -> None:
        self.storage = store

    def __enter__(self) -> _Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def has_job(self, job: str) -> bool:
        from genmodels.runs.jobs import Jobs

        return Jobs(self.storage).is_known(job)

    def delete_job(self, job: str) -> None:
        from genmodels.runs.jobs import Jobs

        Jobs(self.storage).delete(job)

    def model(self, model: str) -> dict[str, Any]:
        from genmodels.registry.removal import model_contents

        return asdict(model_contents(self.storage, model))

    def delete_model(self, model: str, with_runs: bool) -> None:
        from genmodels.registry.removal import delete_model

        delete_model(self.storage, model, with_runs=with_runs)

    def version(self, name: str) -> int:
        from genmodels.registry.store import Registry

        return Registry(self.storage).resolve(name).version

    def delete_version(self, model: str, number: int) -> None:
        from genmodels.registry.gc import delete_version
        from genmodels.registry.store import Registry

        delete_version(Registry(self.storage), model, number)

    def delete_alias(self, model: str, alias: str) -> None:
        from genmodels.registry.store import Registry

        Registry(self.storage).remove_alias(model, alias)

    def dataset(self, name: str) -> dict[str, Any]:
        from genmodels.registry.removal import dataset_contents

        return asdict(dataset_contents(self.storage, name))

    def delete_dataset(self, name: str) -> None:
        from genmodels.registry.removal import delete_dataset

        delete_dataset(self.storage, name)


class _Remote:
    """The same of a job service."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.delete_job, self.delete_version = client.delete_job, client.delete_version
        self.delete_alias = client.delete_alias

    def __enter__(self) -> _Remote:
        self.client.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.__exit__()

    def has_job(self, job: str) -> bool:
        try:
            self.client.job(job)
        except JobNotFound:
            return False
        return True

    def model(self, model: str) -> dict[str, Any]:
        return self.client.delete_model(model, dry_run=True)

    def delete_model(self, model: str, with_runs: bool) -> None:
        self.client.delete_model(model, with_runs=with_runs)

    def version(self, name: str) -> int:
        return self.client.version(*self.client.resolve(name)).version

    def dataset(self, name: str) -> dict[str, Any]:
        return self.client.delete_dataset(name, dry_run=True)

    def delete_dataset(self, name: str) -> None:
        self.client.delete_dataset(name)


def _plan(place: _Local | _Remote, what: str, model: bool, with_runs: bool) -> tuple[str, Callable[[], object], str]:
    """Look at what is named: what to ask, what to do, and what to say when it is done.

    Raises:
        GenmodelsError: there is no such thing.
    """
    name, at, reference = what.partition("@")
    if at:
        return _plan_reference(place, name, reference)
    is_job = not model and place.has_job(name)
    try:
        found = place.model(name)
    except ModelNotFound:
        found = None
    if is_job and found:
        raise SpecError(f"{name} is a job and a model: write `genmodels delete {name} --model` for the model")
    if is_job:
        question = f"Delete job {name}, its checkpoints and its logs?"
        return question, lambda: place.delete_job(name), f"job {name} is deleted"
    if not found:
        listed = "`genmodels models`" if model else "`genmodels models` and `genmodels jobs`"
        raise GenmodelsError(f"no {'model' if model else 'job or model'} {name!r}; {listed} list what there is")
    runs = _runs(found["jobs"], with_runs)
    return (
        f"Delete model {name} ({_amounts(found)})? {runs}",
        lambda: place.delete_model(name, with_runs),
        f"model {name} is deleted. {runs}".rstrip(),
    )


def _plan_reference(place: _Local | _Remote, name: str, reference: str) -> tuple[str, Callable[[], object], str]:
    if reference in ("latest", "live") or reference.startswith("step-") or ":" in reference:
        raise SpecError(f"{name}@{reference}: name a version by its number, or an alias; `genmodels models` lists them")
    number = place.version(f"{name}@{reference}")
    if reference.isdecimal():
        what = f"version {name}@{number}"
        return f"Delete {what}?", lambda: place.delete_version(name, number), f"{what} is deleted"
    question = f"Delete alias {name}@{reference}, which names version {number}? The version stays."
    done = f"alias {name}@{reference} is deleted; version {number} stays"
    return question, lambda: place.delete_alias(name, reference), done


def _amounts(found: dict[str, Any]) -> str:
    from services.console.tables import amount

    aliases = ", ".join(found["aliases"])
    parts = [_count(len(found["versions"]), "version"), f"aliases {aliases}" if aliases else "no alias"]
    return ", ".join([*parts, amount(found["bytes"])])


def _runs(jobs: list[str], with_runs: bool) -> str:
    if not jobs:
        return ""
    listed = ", ".join(jobs)
    if with_runs:
        return f"The checkpoints, samples and logs of its runs go too: {listed}."
    return f"The checkpoints, samples and logs of its runs stay: {listed}; --with-runs takes them too."


def _trained(found: dict[str, Any]) -> str:
    if not found["runs"]:
        return "Nothing was trained on it."
    versions = ", ".join(found["versions"]) or "none"
    stays = "what was made of it stays, samples and weights too, until it is deleted"
    return f"Trained on it: {', '.join(found['runs'])}; versions: {versions}; {stays}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
