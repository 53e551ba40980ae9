"""Define `genmodels submit`, `jobs`, `status`, `logs`, `cancel`, `resume`: they always use the job API."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from genmodels.errors import SpecError
from genmodels.runs.records import ENDED
from services.cli.options import Api, AsJson, JobId, Models, SpecFile, client, read_document
from services.console.output import console, print_json, tell

if TYPE_CHECKING:
    from services.client.jobs import Client
    from services.jobs.schemas import JobView, RunView

app = typer.Typer()
PANEL = "Jobs on a job service"
API = "http://127.0.0.1:8080"
MAX_PAGE = 100

Gateway = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="GENMODELS_GATEWAY",
        help="URL of the endpoint, for the curl lines at the end; default: the job service names it.",
        show_default=False,
    ),
]


class Kind(StrEnum):
    all = "all"
    open = "open"
    ended = "ended"


@app.command(rich_help_panel=PANEL)
def submit(
    spec: SpecFile,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Follow the job until it has ended; exit code 0 or 1.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only report what would run: steps, workers, sizes, and whether it fits.")
    ] = False,
    api: Api = API,
    gateway: Gateway = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job and print its id."""
    data, source = read_document(spec)
    with client(api) as service:
        if dry_run:
            from services.console.tables import dry_run_table

            report = service.dry_run(data, source)
            if as_json:
                print_json(report)
                return
            console().print(dry_run_table(report))
            for model in report["models"]:
                for note in model["notes"]:
                    print(f"{model['model']}: {note}")
            return
        job = service.submit(data, source)
        for note in job.notes:
            tell(note)
        if as_json and not wait:
            print_json(job.model_dump(mode="json"))
        else:
            print(job.job, flush=True)
        if wait:
            sys.exit(_follow(service, job, gateway, as_json))
        tell(f"`genmodels status {job.job}` shows its progress, `genmodels logs -f {job.job}` follows its logs")


@app.command(rich_help_panel=PANEL)
def jobs(
    state: Annotated[Kind, typer.Option(help="Which jobs; open jobs are queued or running.")] = Kind.all,
    limit: Annotated[
        int, typer.Option(help="Largest number of jobs; open jobs come first, then the newest.", min=1)
    ] = 20,
    api: Api = API,
    as_json: AsJson = False,
) -> None:
    """List jobs."""
    from services.console.tables import jobs_table

    with client(api) as service:
        listed, more = _take(_all(service, state), limit)
    if as_json:
        print_json([job.model_dump(mode="json") for job in listed])
        return
    if not listed:
        print(f"no {'' if state == Kind.all else f'{state} '}jobs; `genmodels submit SPEC` submits one")
        return
    console().print(jobs_table(listed))
    if more:
        tell(f"there are more jobs: --limit {2 * limit} shows more")


@app.command(rich_help_panel=PANEL)
def status(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Id of a job; default: all open jobs.", show_default=False)
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Follow the job until it has ended; exit code 0 or 1.")
    ] = False,
    history: Annotated[
        bool, typer.Option("--history", help="Also show every change of state, with time and reason.")
    ] = False,
    api: Api = API,
    gateway: Gateway = None,
    as_json: AsJson = False,
) -> None:
    """Show the state and progress of each model of a job."""
    from services.console.tables import history_table, runs_table

    if wait and job is None:
        raise SpecError("--wait needs the id of a job: genmodels status JOB --wait")
    with client(api) as service:
        if wait and job is not None:
            sys.exit(_follow(service, service.job(job), gateway, as_json))
        views = [service.job(job)] if job else list(_all(service, Kind.open))
    if as_json:
        documents = [view.model_dump(mode="json") for view in views]
        print_json(documents[0] if job else documents)
        return
    if not views:
        print("no open jobs; `genmodels jobs` lists the jobs that have ended")
        return
    for view in views:
        console().print(runs_table(view))
        if history:
            console().print(history_table(view))


@app.command(rich_help_panel=PANEL)
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the job has ended.")] = False,
    models: Models = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="driver|RANK", help="Only the output of the driver, or of one worker: 0, 1, ...", show_default=False
        ),
    ] = None,
    api: Api = API,
) -> None:
    """Print a job's logs, while the job runs and afterwards."""
    with client(api) as service:
        any_line = False
        for line in service.logs(job, models or [], source, follow=follow, waiting=lambda why: tell(f"waiting: {why}")):
            any_line = True
            print(line, flush=follow)
        if not any_line:
            tell(f"the logs are empty; `genmodels status {job}` shows the job's state")


@app.command(rich_help_panel=PANEL)
def cancel(
    job: JobId,
    now: Annotated[
        bool, typer.Option("--now", help="End at once, and lose the steps since the last checkpoint.")
    ] = False,
    models: Models = None,
    api: Api = API,
) -> None:
    """Cancel a job. Its runs save at their next step and end; `genmodels resume` continues from there."""
    with client(api) as service:
        view = service.cancel(job, models or [], now=now)
    stopping = [run for run in _chosen(view, models) if run.state not in ENDED]
    if not stopping:
        print(f"{job}: nothing to cancel, the runs have ended")
        return
    for run in stopping:
        print(f"{job}: {run.model} {_end(run, now)}")
    tell(f"`genmodels resume {job}` continues from there")


@app.command(rich_help_panel=PANEL)
def resume(job: JobId, models: Models = None, api: Api = API) -> None:
    """Resume a failed or cancelled job. It is queued again and starts from its last checkpoint."""
    with client(api) as service:
        view = service.resume(job, models or [])
    resumed = [run.model for run in _chosen(view, models) if run.state != "succeeded"]
    print(f"{job}: {', '.join(resumed)} will continue from the last checkpoint")


def _follow(service: Client, job: JobView, gateway: str | None, as_json: bool) -> int:
    from services.cli.wait import conclude, follow
    from services.cluster.environment import ignore_output_errors

    ignore_output_errors()
    screen = console(stderr=as_json)
    try:
        job = follow(service, job, screen)
    except KeyboardInterrupt:
        again, end = f"genmodels status {job.job} --wait", f"genmodels cancel {job.job}"
        tell(f"{job.job} continues; `{again}` follows it again, `{end}` ends it")
        raise
    code = conclude(service, job, gateway, screen)
    if as_json:
        print_json(job.model_dump(mode="json"))
    return code


def _end(run: RunView, now: bool) -> str:
    """Describe how a cancelled run ends: only a run that trains has something to save."""
    if run.state == "queued":
        return "leaves the queue"
    return "will end at once" if now or run.state == "starting" else "will save at the next step and end"


def _chosen(job: JobView, models: list[str] | None) -> list[RunView]:
    return [run for run in job.models if not models or run.model in models]


def _all(service: Client, state: Kind) -> Iterator[JobView]:
    after = None
    while True:
        page = service.jobs(state.value, MAX_PAGE, after)
        yield from page.data
        after = page.next
        if after is None:
            return


def _take(jobs: Iterator[JobView], limit: int) -> tuple[list[JobView], bool]:
    return list(islice(jobs, limit)), next(jobs, None) is not None
