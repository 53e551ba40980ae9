"""Show a job while it runs (`--wait`), and print the summary when it has ended."""

from __future__ import annotations

import time

from rich.console import Console
from rich.text import Text

from genmodels import models
from genmodels.data.text import EXAMPLE
from genmodels.errors import GenmodelsError
from genmodels.runs.records import ENDED
from services.client.http import Unreachable
from services.client.jobs import Client
from services.console.curl import curl
from services.console.progress import Board, Shown, waiting_note
from services.console.tables import note
from services.jobs.schemas import JobView, RunView

POLL_SECONDS = 1.0


def follow(client: Client, job: JobView, console: Console) -> JobView:
    """Show a job until all its runs have ended, also across restarts of the service; return its last view.

    Only changes after the call are shown.

    Raises:
        KeyboardInterrupt: Ctrl-C; the job continues.
        GenmodelsError: the job was deleted, or the key was revoked.
    """
    printed = {run.model: len(run.history) for run in job.models}
    away = False
    with Board(console) as board:
        while True:
            for run in job.models:
                _print_changes(board, run, printed)
                board.show(_shown(run))
            if job.state in (*ENDED, "damaged"):  # a damaged job is not continued
                return job
            time.sleep(POLL_SECONDS)
            try:
                job = client.job(job.job)
                away = False
            except Unreachable as error:
                if not away:
                    board.print(f"waiting: {error}")
                away = True


def conclude(client: Client, job: JobView, gateway: str | None, console: Console) -> int:
    """Print the result of a job that has ended and how to use the published models; return the exit code.

    Args:
        gateway: URL of the endpoint; default: the URL that the job service names.
    """
    for run in job.models:
        if run.state != "succeeded":
            console.print(Text(f"{run.model}: {run.state}", "red"), Text(f": {run.reason}"), sep="", soft_wrap=True)
    unsuccessful = [run for run in job.models if run.state != "succeeded"]
    if unsuccessful:
        hint = f"`genmodels logs {job.job}` shows why; `genmodels resume {job.job}` continues from the last checkpoint"
        console.print(hint, soft_wrap=True)
    published = [run for run in job.models if run.state == "succeeded"]
    endpoint = gateway or job.endpoint
    if published:
        console.print("Try:" if endpoint else "Try, where GENMODELS_GATEWAY is the URL of the endpoint:")
    for run in published:
        line = curl(_model(client, run), endpoint or "$GENMODELS_GATEWAY", key=client.key is not None)[0]
        console.print(f"  {line}", soft_wrap=True)
    return 1 if unsuccessful else 0


def _print_changes(board: Board, run: RunView, printed: dict[str, int]) -> None:
    """Print the changes of state that the board does not show, e.g. why an attempt was lost."""
    new = run.history[printed[run.model] :]
    for change in new:
        missed = change.state == "queued" if board.console.is_terminal else change is not new[-1]
        if missed and change is not run.history[0]:
            board.print(f"{run.model}: {change.state} ({change.reason})")
    printed[run.model] = len(run.history)


def _shown(run: RunView) -> Shown:
    return Shown(
        model=run.model,
        state=run.state,
        phase=run.phase or "",
        step=run.step or 0,
        max_steps=run.max_steps or 0,
        loss=run.loss,
        seconds_left=run.seconds_left,
        note=note(run),
        waiting=waiting_note(run.phase, run.waiting),
    )


def _model(client: Client, run: RunView) -> dict[str, object]:
    """Describe a model as the gateway lists it. Ask only the job service: the key may go to no other address."""
    name = run.model if run.alias == "production" else f"{run.model}@{run.alias or run.version}"
    verb = models.load(run.family or "").sample_verb
    prompt = {"example_prompt": _example_prompt(client, run)} if verb == "complete" else {}
    return {"id": name, "verbs": [verb], **prompt}


def _example_prompt(client: Client, run: RunView) -> str:
    try:
        return client.example_prompt(run.model, run.version or 0)
    except GenmodelsError:  # the version may be gone
        return EXAMPLE
