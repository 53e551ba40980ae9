"""What `--wait` shows of a job until it has ended, and what it says in the end."""

from __future__ import annotations

import time

import httpx
from rich.console import Console

from genmodels import models
from genmodels.run import ENDED
from services.client import Client
from services.curl import curl
from services.tables import note
from services.terminal import Board, Shown, waits
from services.transport import Unreachable
from services.views import JobView, RunView

POLL_SECONDS = 1.0
ASK_SECONDS = 3.0  # for the gateway to say what a model can do


def follow(client: Client, job: JobView, console: Console) -> JobView:
    """Show a job until all its runs have ended, over restarts of the service; how it stands then.

    What happened to it before is not told again.

    Raises:
        KeyboardInterrupt: Ctrl-C; the job goes on.
        GenmodelsError: it is not there any more, or the key was revoked.
    """
    told = {run.model: len(run.history) for run in job.models}
    away = False
    with Board(console) as board:
        while True:
            for run in job.models:
                _tell(board, run, told)
                board.show(_shown(run))
            if job.state in (*ENDED, "damaged"):  # one that is damaged is carried on by nobody
                return job
            time.sleep(POLL_SECONDS)
            try:
                job = client.job(job.job)
                away = False
            except Unreachable as error:
                if not away:
                    board.say(f"waiting: {error}")
                away = True


def conclude(client: Client, job: JobView, gateway: str, console: Console) -> int:
    """Say what came of a job that has ended, and how to use what it published; the exit code."""
    for run in job.models:
        if run.state != "succeeded":
            console.print(f"[red]{run.model}: {run.state}[/red]", end="", highlight=False)
            console.print(f": {run.reason}", markup=False, highlight=False, soft_wrap=True)
    unsuccessful = [run for run in job.models if run.state != "succeeded"]
    if unsuccessful:
        hint = f"`genmodels logs {job.job}` shows why; `genmodels resume {job.job}` goes on from the last checkpoint"
        console.print(hint, markup=False, highlight=False, soft_wrap=True)
    published = [run for run in job.models if run.state == "succeeded"]
    if published:
        console.print("Try:", highlight=False)
    for run in published:
        line = curl(_model(client, run, gateway), gateway, key=client.key is not None)[0]
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return 1 if unsuccessful else 0


def _tell(board: Board, run: RunView, told: dict[str, int]) -> None:
    """Changes that the bar does not keep (what an attempt was lost by), or of which the lines would miss some."""
    new = run.history[told[run.model] :]
    for change in new:
        missed = change.state == "queued" if board.console.is_terminal else change is not new[-1]
        if missed and change is not run.history[0]:
            board.say(f"{run.model}: {change.state} ({change.reason})")
    told[run.model] = len(run.history)


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
        waiting=waits(run.phase, run.waiting),
    )


def _model(client: Client, run: RunView, gateway: str) -> dict[str, object]:
    """A model as the gateway lists it: what it says itself, or, where it does not, what its family can do."""
    name = run.model if run.alias == "production" else f"{run.model}@{run.alias or run.version}"
    headers = {"authorization": f"Bearer {client.key}"} if client.key else {}
    try:
        answer = httpx.get(f"{gateway}/v1/models/{name}", headers=headers, timeout=ASK_SECONDS, trust_env=False)
        if answer.is_success and answer.json()["verbs"]:
            return {"id": name, "verbs": answer.json()["verbs"]}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
        pass  # it may be elsewhere, or this key not be for it
    kind = models.load(run.family or "").kind
    return {"id": name, "verbs": ["complete"] if kind == "text" else ["generate"]}
