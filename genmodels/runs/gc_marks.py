"""Mark the runs that clean-up has to look at, so that it reads no run that it has finished with.

    gc/<job>/<model>/<nonce>        something of this run, or of its model, may have to be removed now or later
    gc/.complete                    put by the first clean-up that read all runs: it marked those that are not finished

A run is marked after the change: when it is submitted, when it is resumed, and when a version of it is deleted.
Clean-up lists the marks before it reads a run, and removes only these marks. So a change that it did not see leaves a
mark that stays.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from genmodels.runs.job_index import JOB_ID
from genmodels.spec.names import LABEL
from genmodels.storage import Storage

COMPLETE = "gc/.complete"

RunId = tuple[str, str]  # job and model


def mark(storage: Storage, job: str, models: Iterable[str]) -> None:
    """Let the next clean-up look at runs of a job."""
    for model in models:
        storage.put(f"gc/{job}/{model}/{secrets.token_hex(8)}", b"")


@contextmanager
def marked(storage: Storage, job: str, model: str) -> Iterator[None]:
    """Mark a run after a change, and also before it, because the process may end in between."""
    mark(storage, job, [model])
    yield
    mark(storage, job, [model])


def read_marks(storage: Storage) -> dict[RunId, list[str]]:
    """Return the keys of the marks of each run, by job and model."""
    marks: dict[RunId, list[str]] = {}
    for key in storage.list("gc/"):
        if match := re.fullmatch(rf"gc/(?P<job>{JOB_ID})/(?P<model>{LABEL.strip('^$')})/[0-9a-f]+", key):
            marks.setdefault((match["job"], match["model"]), []).append(key)
    return marks
