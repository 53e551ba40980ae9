"""Bodies, queries and answers of the job API."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

from genmodels.engine.requests import Body
from genmodels.runs.records import Change, State
from genmodels.spec.names import Label
from services.http.query import Strict

ShownState: TypeAlias = State | Literal["damaged"]  # damaged: its status cannot be read


class RunView(BaseModel):
    """The training of one model. Unknown values are null."""

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
    wait: str | None = None  # why the run waits in the queue
    waiting: str | None = None  # why the attempt waits, e.g. "the storage is full"
    metrics: dict[str, float | None] = {}  # of the last evaluation, once the run has ended
    version: int | None = None  # the published version
    alias: str | None = None  # the alias under which the model is served
    history: list[Change] = []


class JobView(BaseModel):
    """A job and its runs. In a list, an ended job shows only each model and its state."""

    job: str
    name: str
    priority: int
    state: ShownState
    submitted: str
    ended: str | None = None
    models: list[RunView]
    notes: list[str] = []  # at its submission: defaults that were chosen, and what to expect
    endpoint: str | None = None  # URL of the gateway, if the service knows it; not in lists


class ModelDryRun(BaseModel):
    """The plan of one model's training. Unknown values are null, and a note says why."""

    model: str
    family: str
    dataset: str
    max_steps: int
    batch_size: int
    workers: tuple[int, int]  # smallest and largest number
    use_gpu: bool
    samples: int | None = None  # in an epoch of the training data
    epochs: float | None = None
    parameters: int | None = None  # of all networks of the model
    checkpoint_bytes: int | None = None  # of one checkpoint: raw and served weights, optimizers
    worker_bytes: int | None = None  # what each of the fewest workers holds: weights, average, gradients, optimizers
    serving_bytes: int | None = None  # memory of a model host for it
    servable: bool | None = None  # whether a model host has that memory; else a note says what to change
    checkpoints_kept: int
    fits: bool | None = None  # whether the smallest worker group fits the cluster at its largest, and its machines
    notes: list[str] = []


class JobDryRun(BaseModel):
    name: str
    priority: int
    models: list[ModelDryRun]


class Page(BaseModel):
    """One page of jobs: open jobs first, then ended jobs, newest first."""

    data: list[JobView]
    next: str | None = None  # value of `after` for the next page; null: this page is the last


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
    points: int | None = Field(
        None, ge=10, le=10_000, description="largest number of rows, evenly spaced; default: all"
    )


class CancelBody(Body):
    now: bool = Field(False, description="end at once, and lose the steps since the last checkpoint")
    models: Names = Field(None, description="only these models of the job")


class ResumeBody(Body):
    models: Names = Field(None, description="only these models of the job")


class AliasBody(Body):
    version: int = Field(ge=1, le=99_999_999, description="number of the version; it may be older than the current one")


class DryRunQuery(Strict):
    dry_run: bool = Field(False, description="only report what would be removed")


class GcQuery(DryRunQuery):
    all: bool = Field(False, description="read all runs and versions, not only those that have changed")


class DeleteModelQuery(DryRunQuery):
    with_runs: bool = Field(False, description="also delete the checkpoints, samples and logs of its runs")


class DatasetQuery(Strict):
    replace: bool = Field(False, description="replace another content of this name; without it that is 409")
    image_size: int | None = Field(None, ge=8, le=256, description="side of the square pictures, in pixels")
    channels: Literal["1", "3"] | None = Field(None, description="channels of the pictures: 1 (grey) or 3 (RGB)")
