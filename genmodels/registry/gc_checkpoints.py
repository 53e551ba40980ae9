"""List checkpoints of runs that have ended and do not need them, and remove them: a part of `gc`."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from genmodels.checkpoint import MANIFEST, CheckpointRef
from genmodels.errors import DamagedObject, GenmodelsError, JobNotFound, KeyNotFound, StorageError
from genmodels.registry import references
from genmodels.registry.gate import best
from genmodels.runs.jobs import Jobs
from genmodels.runs.records import ENDED
from genmodels.runs.store import Run
from genmodels.spec.sections import Gate
from genmodels.storage import Storage
from genmodels.storage.base import PartialUpload

SPARED_SECONDS = 3600.0
UNFINISHED = "an upload that never ended"


@dataclass(frozen=True)
class Item:
    key: str  # an object, or a folder, which ends in "/"
    bytes: int
    why: str
    upload: PartialUpload | None = None  # its parts are the item; the object itself may exist


@dataclass(frozen=True)
class RunGarbage:
    """List what can be removed of a run.

    `finished`: when these items are removed, nothing of the run has to be removed later, unless it is marked again.
    """

    job: str
    model: str
    items: list[Item]
    finished: bool


def run_garbage(
    jobs: Jobs,
    job: str,
    models: Iterable[str],
    published: Mapping[tuple[str, str], set[CheckpointRef]],
    spared: Collection[str],
) -> list[RunGarbage]:
    """Return the checkpoints of runs of a closed job that can be deleted.

    Args:
        published: by job and model, the checkpoints that versions were published from.
        spared: models whose published checkpoints are not known.
    """
    try:
        spec = jobs.spec(job)
    except JobNotFound:
        return [RunGarbage(job, model, [], True) for model in models]
    except DamagedObject:  # or of a newer release: keep everything
        return [RunGarbage(job, model, [], False) for model in models]
    gates = {model.name: model.serve.gate for model in spec.models}
    garbage = []
    for model in models:
        run, nothing = Run(jobs.storage, job, model), RunGarbage(job, model, [], False)
        try:
            if model in spared or model not in gates or not has_long_ended(run):
                garbage.append(nothing)
            else:
                garbage.append(
                    RunGarbage(job, model, *_unneeded(run, gates[model], published.get((job, model), set())))
                )
        except StorageError:
            raise
        except GenmodelsError:  # damaged, or deleted just now: keep everything
            garbage.append(nothing)
    return garbage


def has_long_ended(run: Run) -> bool:
    try:
        status, _ = run.status()
    except DamagedObject:
        return False
    return status.state in ENDED and bool(status.history) and age(status.history[-1].time) >= SPARED_SECONDS


def _unneeded(run: Run, gate: Gate | None, named: set[CheckpointRef]) -> tuple[list[Item], bool]:
    """Return all checkpoints except the newest, the best, the pinned ones and the ones in `named`.

    Returns:
        The items, and whether all checkpoints of the chain can be read.
    """
    chain, readable = run.checkpoints(), list(run.manifests())
    newest = (
        1 if run.status()[0].state == "succeeded" else 2
    )  # a run that is resumed may need the one before, if the newest is damaged
    keep = named | {ref for ref, _ in readable[-newest:]} | set(references.pinned_checkpoints(run))
    if readable:
        keep.add(best(gate, readable)[0])
    unreadable = set(chain) - {ref for ref, _ in readable}  # damaged, or unreadable for a moment: keep
    keep |= unreadable
    items = []
    for folder, (ref, sizes) in _folders(run).items():
        if f"{folder}{MANIFEST}" not in sizes:
            why = UNFINISHED
        elif ref in keep:
            continue
        elif ref in chain:
            why = "neither the newest nor the best of a run that has ended"
        else:
            why = "written by an attempt after a newer attempt had started"
        items.append(Item(folder, sum(sizes.values()), why))
    return items, not unreadable


def _folders(run: Run) -> dict[str, tuple[CheckpointRef, dict[str, int]]]:
    """Return every checkpoint directory of a run: its key, its reference, and the sizes of its files."""
    folders: dict[str, tuple[CheckpointRef, dict[str, int]]] = {}
    for attempt in run.attempts():
        for key, size in run.storage.sizes(f"{run.prefix}/attempt-{attempt}/checkpoints/").items():
            match = re.match(r".*/checkpoints/step-(\d+)/", key)
            if match:
                ref = CheckpointRef(attempt=attempt, step=int(match[1]))
                folders.setdefault(match[0], (ref, {}))[1][key] = size
    return folders


def remove_checkpoint(storage: Storage, item: Item) -> bool:
    """Remove a checkpoint: the manifest first, so that no process starts to read a checkpoint that is being deleted.

    Returns:
        False if the next clean-up has to look at it again.
    """
    _, job, model, *_ = item.key.split("/")
    run, manifest = Run(storage, job, model), f"{item.key}{MANIFEST}"
    if storage.exists(f"open/{job}") or not has_long_ended(run):
        return False  # resumed meanwhile
    try:
        data, _ = storage.get(manifest)
    except KeyNotFound:
        data = b""
    if data and item.why == UNFINISHED:
        return False  # the upload has ended after all
    storage.delete(manifest)
    # A process that pins it now has either written its pin, which is read here, or looks for the manifest afterwards,
    # and sees that it is deleted.
    if data and any(f"{run.checkpoint_prefix(ref)}/" == item.key for ref in references.pinned_checkpoints(run)):
        storage.put(manifest, data, if_absent=True)
        return True
    for key in storage.list(item.key):
        storage.delete(key)
    return True


def age(moment: str) -> float:
    """Return the seconds since a moment."""
    return time.time() - datetime.fromisoformat(moment).timestamp()
