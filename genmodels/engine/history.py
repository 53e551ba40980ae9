"""What the training run behind a model left on its way: curves, pictures and texts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from genmodels.errors import CheckpointError, KeyNotFound, RequestError
from genmodels.registry.references import ResolvedModel
from genmodels.runs.store import Run
from genmodels.runs.thinning import thinned, thinned_rows
from genmodels.storage import Storage, decode_floats

MIN_ROWS, MAX_ROWS = 10, 1000
MAX_STEPS = 200  # with samples
SAMPLE = r"^[a-z0-9][a-z0-9_-]{0,63}\.(png|txt)$"


@dataclass(frozen=True)
class History:
    """Of the run that a version came from."""

    version: str
    family: str
    job: str
    step: int  # of the version
    rows: list[dict[str, Any]]  # each has a `step`
    samples: dict[int, list[str]]  # step -> names of files


def read(storage: Storage, found: ResolvedModel, points: int = MAX_ROWS) -> History:
    """The history of the run behind a version: at most `points` rows, and samples of at most MAX_STEPS steps.

    Raises:
        RequestError: the run's records are damaged, or are being deleted.
    """
    run = Run(storage, found.job, found.model)
    try:
        rows, samples = thinned_rows(run.metric_lines(), points), run.samples()
    except (CheckpointError, KeyNotFound):
        raise _gone(found) from None
    files: dict[int, list[str]] = {}
    for step, key in samples:
        name = PurePosixPath(key).name
        if re.fullmatch(SAMPLE, name):
            files.setdefault(step, []).append(name)
    steps = thinned(sorted(files), MAX_STEPS)
    return History(
        found.name,
        found.family,
        found.job,
        found.checkpoint.step,
        [decode_floats(json.loads(row)) for row in rows],
        {step: files[step] for step in steps},
    )


def read_sample(storage: Storage, found: ResolvedModel, step: int, file: str) -> bytes:
    """A file of a history's samples.

    Raises:
        RequestError: there is none of that step and name.
    """
    run = Run(storage, found.job, found.model)
    try:
        keys = (key for at, key in run.samples() if at == step and PurePosixPath(key).name == file)
        if key := next(keys, None):
            return storage.get(key)[0]
    except (CheckpointError, KeyNotFound):
        raise _gone(found) from None
    message = f"the run of {found.name} left no {file!r} at step {step}; GET /v1/models/{found.name}/history lists all"
    raise RequestError(message, status=404, param="name", code="sample_not_found")


def _gone(found: ResolvedModel) -> RequestError:
    message = f"the records of the run behind {found.name} are damaged, or are being deleted"
    return RequestError(message, status=404, param="model", code="history_gone")
