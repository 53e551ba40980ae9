"""One attempt of a run, as every worker of its group executes it: find the checkpoint, claim the attempt, train.

The same under Ray, in plain processes with a process group, and alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from genmodels import __version__, checkpoint, metrics, models
from genmodels.checkpoint import CheckpointRef, Lineage, Manifest
from genmodels.data import Dataset, open_dataset
from genmodels.errors import CheckpointError
from genmodels.evals.images import evenly_spaced
from genmodels.family import Batch, Family
from genmodels.preflight import servable
from genmodels.registry import init_from
from genmodels.runs.control import CommandWatcher
from genmodels.runs.jobs import Jobs
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Heartbeat
from genmodels.runs.store import Run
from genmodels.spec.parse import model_digest
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage
from genmodels.storage.disk import disk_outages
from genmodels.training import flops
from genmodels.training.group import Group
from genmodels.training.loop import examples, train
from genmodels.training.recorder import RunRecorder

log = logging.getLogger(__name__)

FIT_EXAMPLES, FIT_BATCH = 4096, 256


def work(storage: Storage, job: str, model: str, attempt: int, group: Group) -> bool:
    """`run_attempt` in a process of its own: what it prints goes to storage as well, and it obeys commands."""
    run = Run(storage, job, model)
    # here, because Ray passes on an error without its causes
    with LogShipper(run, attempt, str(group.rank)) as logs, CommandWatcher(run, attempt, logs) as watch, disk_outages():
        return run_attempt(storage, job, model, attempt, group, watch.should_stop)


def run_attempt(
    storage: Storage, job: str, model: str, attempt: int, group: Group, stop_event: threading.Event | None = None
) -> bool:
    """Train one model of a job from its newest whole checkpoint on, as attempt number `attempt`.

    Args:
        stop_event: set when the attempt is to save at its next step and to end; only rank 0's counts.

    Returns:
        True when `max_steps` is reached, False if it left on a command. Either way everything is in storage.

    Raises:
        Superseded: another attempt has taken over.
        TrainingDiverged, DataError, SpecError: the user's to mend.
    """
    spec = Jobs(storage).model_spec(job, model)
    run = Run(storage, job, model)
    if group.rank == 0:  # from here on the driver no longer beats for this attempt
        run.write_heartbeat(attempt, Heartbeat(phase="starting", max_steps=spec.train.max_steps, progress_count=1))
    dataset = open_dataset(spec.data, storage)
    with checkpoint.scratch_folder() as name:
        parent = _claim(run, attempt, group, Path(name))
        resume = (parent.folder, parent.manifest) if parent else None
        source = parent.folder if parent else init_from.fetch(spec, storage, Path(name, "initial"))
        if source:
            init_from.adopt_tokenizer(dataset, source)
        torch.manual_seed(spec.train.seed)
        family, served, scratch = (build(spec, dataset) for _ in range(3))
        if source and not parent:
            init_from.load(family, source)
        goes_on = (
            f"continues from step {parent.checkpoint.step} of attempt {parent.checkpoint.attempt}"
            if parent
            else "begins"
        )
        log.info("attempt %d, rank %d of %d: %s", attempt, group.rank, group.world_size, goes_on)
        if group.rank > 0:
            return train(spec, family, served, dataset, group, None, resume)
        lineage = Lineage(
            spec_digest=model_digest(spec),
            data_digest=dataset.digest,
            code_version=__version__,
            world_size=group.world_size,
            parent=parent.checkpoint if parent else None,
        )
        effort = _effort(spec, scratch, dataset, group.device) if metrics.exported() else None
        with RunRecorder(
            run,
            attempt,
            spec,
            scratch,
            dataset.assets(),
            lambda: fit_batches(dataset, scratch),
            lineage,
            stop_event,
            effort,
        ) as recorder:
            return train(spec, family, served, dataset, group, recorder, resume)


def build(spec: ModelSpec, dataset: Dataset) -> Family[Any, Any]:
    """A fresh model for a dataset.

    Raises:
        SpecError: family and dataset do not fit, or no host can serve such a model.
    """
    cls = models.load(spec.family)
    cls.check(spec.model, dataset.info)
    servable.check(spec, dataset.info)
    return cls(spec.model, dataset.info)


def fit_batches(dataset: Dataset, family: Family[Any, Any]) -> Iterator[Batch]:
    """A bounded, fixed part of the training data for `Family.fit`."""
    split = dataset.split("train", family.sequence_length)
    chosen = evenly_spaced(len(split), FIT_EXAMPLES)
    for index in np.array_split(chosen, -(-len(chosen) // FIT_BATCH)):
        yield examples(split, index, torch.device("cpu"))


def _effort(
    spec: ModelSpec, family: Family[Any, Any], dataset: Dataset, device: torch.device
) -> flops.StepFlops | None:
    config = spec.train
    split = dataset.split("train", family.sequence_length)
    index = np.arange(config.batch_size // config.accumulation_steps) % len(split)
    batch = examples(split, index, torch.device("cpu"))
    return flops.estimate(family, batch, config, device)


@dataclass(frozen=True)
class Parent:
    """The checkpoint an attempt continues from, fetched and verified."""

    checkpoint: CheckpointRef
    folder: Path
    manifest: Manifest


def _claim(run: Run, attempt: int, group: Group, folder: Path) -> Parent | None:
    """Rank 0 picks the newest checkpoint that is whole and writes `start.json`; the others follow what it says."""
    parent = None
    if group.rank == 0:
        parent = _newest_whole(run, folder)
        run.start_attempt(attempt, parent.checkpoint if parent else None, group.world_size)
    if dist.is_initialized():
        dist.barrier()
    if group.rank == 0:
        return parent
    ref = run.chain()[-1].parent
    return _fetch(run, ref, folder) if ref else None


def _newest_whole(run: Run, folder: Path) -> Parent | None:
    for ref in reversed(run.checkpoints()):
        try:
            return _fetch(run, ref, folder)
        except CheckpointError:
            continue  # damaged, or cleaned away meanwhile: the one before will do
    return None


def _fetch(run: Run, ref: CheckpointRef, folder: Path) -> Parent:
    target = folder / f"{ref.attempt}-{ref.step}"
    target.mkdir()
    return Parent(ref, target, checkpoint.fetch(run.storage, run.checkpoint_prefix(ref), target))
