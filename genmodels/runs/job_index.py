"""Index jobs by what they train and what they train on, so that nothing reads all jobs there ever were.

models/<model>/runs/<time>-<job>        which jobs train a model
dataset-users/<dataset>/<job>           which jobs train on an added dataset

The time counts down, so that a listing begins with the newest job. An entry is put before its job exists, and may stay
after the job is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from genmodels.spec.sections import JobSpec
from genmodels.storage import Storage, list_names

JOB_ID = r"[a-z0-9]([a-z0-9-]{0,70}[a-z0-9])?"
TIMED_NAME = rf"\d{{13}}-{JOB_ID}"
END_OF_TIME = 10**13  # milliseconds; times count down from here
AT_ONCE = 8  # names that are listed at a time


def index_job(storage: Storage, job: str, spec: JobSpec, submitted: str) -> None:
    """Record which models a job trains, and on which datasets."""
    index_runs(storage, job, [model.name for model in spec.models], submitted)
    for key in user_keys(job, spec):
        storage.put(key, b"")


def index_runs(storage: Storage, job: str, models: Iterable[str], submitted: str) -> None:
    """Record which models a job trains."""
    for key in run_keys(job, models, submitted):
        storage.put(key, b"")


def run_jobs(storage: Storage, model: str) -> list[str]:
    """Return the jobs that train a model, the newest first, possibly also jobs that do not exist yet or any more."""
    prefix = f"models/{model}/runs/"
    return [key.removeprefix(prefix).partition("-")[2] for key in storage.list(prefix)]


def newest_run(storage: Storage, model: str) -> str | None:
    """Return the newest job that trains a model."""
    last = ""
    while names := list_names(storage, f"models/{model}/runs/", TIMED_NAME, after=last, limit=AT_ONCE):
        last = names[-1]
        jobs = (name.partition("-")[2] for name in names)
        if job := next((job for job in jobs if storage.exists(spec_key(job))), None):  # a complete submission
            return job
    return None


def spec_key(job: str) -> str:
    return f"jobs/{job}/spec.json"


def run_keys(job: str, models: Iterable[str], submitted: str) -> list[str]:
    return [f"models/{model}/runs/{countdown(submitted)}-{job}" for model in models]


def user_keys(job: str, spec: JobSpec) -> list[str]:
    names = {model.data.dataset for model in spec.models if model.data.dataset and model.data.is_added}
    return [f"dataset-users/{name}/{job}" for name in sorted(names)]


def countdown(time: str) -> str:
    return f"{END_OF_TIME - round(datetime.fromisoformat(time).timestamp() * 1000):013d}"
