"""TODO"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

from genmodels.engine.requests import Body
from genmodels.runs.records import Change, State
from genmodels.spec.names import Label
from services.http.query import Strict

ShownState: TypeAlias = State | Literal["damaged"]  # damaged: what has become of it cannot be read, and is not guessed


class RunView(BaseModel):
    """The training of one model. What is not known (yet) is null."""

    model: str
    family: str | None = None
    state: ShownState
    reason: str = ""
    attempt: int = 0
    workers: int = 0
    phase: str | None = None
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    position: int | None = None  # in the queue, from 1 on
    wait: str | None = None  # why it waits there
    waiting: str | None = None  # what its attempt waits for, e.g. "the storage is full"
    metrics: dict[str, float | None] = {}  # of what was trained, once it has ended
    version: int | None = None  # that was published
    alias: str | None = None  # under which it is served
    history: list[Change] = []


class JobView(BaseModel):
    """A job and its runs. A list shows of ended jobs only what the index has: each model and its state."""

    job: str
    name: str
    priority: int
    state: ShownState
    submitted: str
    ended: str | None = None
    models: list[RunView]
    notes: list[str] = []  # on its submission: what was chosen, what to expect
    endpoint: str | None = None  # URL of the gateway, where the service was told of it; not in lists


class Page(BaseModel):
    """Some of the jobs: open ones first, then ended ones, newest first."""

    data: list[JobView]
    next: str | None = None  # for `after`; null: there are no more


Names = Annotated[list[Label] | None, Field(max_length=100)]


class SubmitQuery(Strict):
    dry_run: bool = Field(False, description="only report what would run")


class ListQuery(Strict):
    state: Literal["all", "open", "ended"] = Field("all", description="which jobs; open jobs are queued or running")
    limit: int = Field(20, ge=1, le=100, description="largest number of jobs on a page")
    after: str = Field(
        "", max_length=300, pattern=r"^((open|ended)![\w :.+!-]*)?$", description="`next` of the page before"
    )


class LogQuery(Strict):
    model: list[str] = Field([], max_length=100, description="only the logs of these models of the job")
    follow: bool = Field(False, description="continue until the job has ended")
    source: str | None = Field(None, pattern=r"^(driver|[0-9]{1,4})$", description="`driver`, or a worker's rank")


class MetricsQuery(Strict):
    model: str | None = Field(
        None, max_length=100, description="model of the job; required if the job has several models"
    )
    after: int = Field(0, ge=0, le=10**9, description="only rows of later steps")
    points: int | None = Field(None, ge=10, le=10_000, description="the most rows, evenly spread; default: all")


class CancelBody(Body):
    now: bool = Field(False, description="end at once, and lose the steps since the last checkpoint")
    models: Names = Field(None, description="only these models of the job")


class ResumeBody(Body):
    models: Names = Field(None, description="only these models of the job")


class AliasBody(Body):
    version: int = Field(ge=1, le=99_999_999, description="number of the version, newer or older")


class DryRunQuery(Strict):
    dry_run: bool = Field(False, description="only report what would be removed")


class DeleteModelQuery(DryRunQuery):
    with_runs: bool = Field(False, description="also delete the checkpoints, samples and logs of its runs")


class DatasetQuery(Strict):
    replace: bool = Field(False, description="replace another content of this name; without it that is 409")
    image_size: int | None = Field(None, ge=8, le=256, description="side of the square pictures, in pixels")
    channels: Literal["1", "3"] | None = Field(None, description="channels of the pictures: 1 (grey) or 3 (RGB)")
