"""Read the records of the training run behind a model: metrics, sample images and sample texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from genmodels.errors import CheckpointError, KeyNotFound, RequestError
from genmodels.registry.references import ResolvedModel
from genmodels.runs.store import Run
from genmodels.runs.thinning import ThinnedHistories, decoded, thinned
from genmodels.storage import Storage

MIN_ROWS, MAX_ROWS = 10, 1000
MAX_STEPS = 200  # that have samples
SAMPLE = r"^[a-z0-9][a-z0-9_-]{0,63}\.(png|txt)$"


@dataclass(frozen=True)
class History:
    """The records of the run that trained a version."""

    version: str
    family: str
    job: str
    step: int  # of the version
    rows: list[dict[str, Any]]  # logged metrics; each row has a `step`
    samples: dict[int, list[str]]  # file names by step


def reader(
    storage: Storage, histories: ThinnedHistories, model: ResolvedModel, points: int = MAX_ROWS
) -> Callable[[], History | None]:
    """Return a function that reads the history of the run behind a version.

    It reads at most `points` rows, and samples of at most MAX_STEPS steps. It returns None if it has to be called
    again, since a long history takes long. It raises RequestError if the run's records are damaged, or are being
    deleted.

    Args:
        histories: what was read before.
    """
    run = Run(storage, model.job, model.model)
    read_rows = histories.reader(run, points)

    def read() -> History | None:
        try:
            rows = read_rows()
            return None if rows is None else _history(model, rows, run.samples())
        except (CheckpointError, KeyNotFound):
            raise _gone(model) from None

    return read


def _history(model: ResolvedModel, rows: list[bytes], samples: list[tuple[int, str]]) -> History:
    files: dict[int, list[str]] = {}
    for step, key in samples:
        name = PurePosixPath(key).name
        if re.fullmatch(SAMPLE, name):
            files.setdefault(step, []).append(name)
    steps = thinned(sorted(files), MAX_STEPS)
    return History(
        model.name,
        model.family,
        model.job,
        model.checkpoint.step,
        decoded(rows),
        {step: files[step] for step in steps},
    )


def read_sample(storage: Storage, model: ResolvedModel, step: int, file: str) -> bytes:
    """Read one sample file of a run.

    Raises:
        RequestError: there is no such file.
    """
    run = Run(storage, model.job, model.model)
    try:
        keys = (key for at, key in run.samples() if at == step and PurePosixPath(key).name == file)
        if key := next(keys, None):
            return storage.get(key)[0]
    except (CheckpointError, KeyNotFound):
        raise _gone(model) from None
    route = f"GET /v1/models/{model.name}/history"
    message = f"the run of {model.name} has no sample {file!r} of step {step}; {route} lists all samples"
    raise RequestError(message, status=404, param="name", code="sample_not_found")


def _gone(model: ResolvedModel) -> RequestError:
    message = f"the records of the run behind {model.name} are damaged, or are being deleted"
    return RequestError(message, status=404, param="model", code="history_gone")
