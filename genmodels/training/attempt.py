"""One attempt of a run, as each worker of its group executes it: find the checkpoint, claim the attempt, train.

It is the same under Ray, in plain processes with a process group, and in a single process.
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
from genmodels.registry import init_from
from genmodels.runs.control import CommandWatcher, HangWatcher
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
    """Call `run_attempt` in a worker process: ship its output to storage, and obey commands."""
    run = Run(storage, job, model)
    # `disk_outages` is here because Ray passes on an error without its causes
    with (
        LogShipper(run, attempt, str(group.rank)) as logs,
        _watcher(run, attempt, group, logs) as watch,
        disk_outages(),
    ):
        return run_attempt(storage, job, model, attempt, group, watch.should_stop)


def _watcher(run: Run, attempt: int, group: Group, logs: LogShipper) -> CommandWatcher:
    """Return what makes this rank obey commands. While training goes on, only rank 0 reads them."""
    if group.rank > 0:
        return HangWatcher(run, attempt, logs, group.still_seconds, group.world_size)
    return CommandWatcher(run, attempt, logs)


def run_attempt(
    storage: Storage, job: str, model: str, attempt: int, group: Group, stop_event: threading.Event | None = None
) -> bool:
    """Train one model of a job from its newest complete checkpoint on, as attempt number `attempt`.

    Args:
        stop_event: when it is set on rank 0, the attempt saves after its next step and ends.

    Returns:
        True if the run is at `max_steps`, False if it stopped before. In both cases everything is in storage.

    Raises:
        Superseded: a newer attempt has taken over.
        TrainingDiverged, DataError, SpecError: the spec or the data is at fault.
    """
    spec = Jobs(storage).model_spec(job, model)
    run = Run(storage, job, model)
    if group.rank == 0:  # from here on rank 0 writes the heartbeats, not the driver
        run.write_heartbeat(attempt, Heartbeat(phase="starting", max_steps=spec.train.max_steps, progress_count=1))
    dataset = open_dataset(spec.data, storage)
    with checkpoint.scratch_folder() as name:
        parent = _claim(run, attempt, group, Path(name))
        resume = (parent.folder, parent.manifest) if parent else None
        source = parent.folder if parent else init_from.fetch(spec, storage, Path(name, "initial"))
        if source:
            init_from.adopt_tokenizer(dataset, source)
        torch.manual_seed(spec.train.seed)
        family, averaged, scratch = (build(spec, dataset) for _ in range(3))
        if source and not parent:
            init_from.load(family, source)
        begins = (
            f"continues from step {parent.checkpoint.step} of attempt {parent.checkpoint.attempt}"
            if parent
            else "begins"
        )
        log.info("attempt %d, rank %d of %d: %s", attempt, group.rank, group.world_size, begins)
        if group.rank > 0:
            return train(spec, family, averaged, dataset, group, None, resume)
        lineage = Lineage(
            spec_digest=model_digest(spec),
            data_digest=dataset.digest,
            code_version=__version__,
            world_size=group.world_size,
            parent=parent.checkpoint if parent else None,
        )
        step_flops = _step_flops(spec, scratch, dataset, group.device) if metrics.exported() else None
        with RunRecorder(
            run,
            attempt,
            spec,
            scratch,
            dataset.assets(),
            lambda: fit_batches(dataset, scratch),
            lineage,
            stop_event,
            step_flops,
        ) as recorder:
            return train(spec, family, averaged, dataset, group, recorder, resume)


def build(spec: ModelSpec, dataset: Dataset) -> Family[Any, Any]:
    """Build a fresh model for a dataset.

    Raises:
        SpecError: the family cannot work on the dataset.
    """
    cls = models.load(spec.family)
    cls.check(spec.model, dataset.info)
    return cls(spec.model, dataset.info)


def fit_batches(dataset: Dataset, family: Family[Any, Any]) -> Iterator[Batch]:
    """Yield a fixed part of the training data for `Family.fit`, at most `FIT_EXAMPLES` examples."""
    split = dataset.split("train", family.sequence_length)
    chosen = evenly_spaced(len(split), FIT_EXAMPLES)
    for index in np.array_split(chosen, -(-len(chosen) // FIT_BATCH)):
        yield examples(split, index, torch.device("cpu"))


def _step_flops(
    spec: ModelSpec, family: Family[Any, Any], dataset: Dataset, device: torch.device
) -> flops.StepFlops | None:
    config = spec.train
    split = dataset.split("train", family.sequence_length)
    index = np.arange(config.batch_size // config.accumulation_steps) % len(split)
    batch = examples(split, index, torch.device("cpu"))
    return flops.estimate(family, batch, config, device)


@dataclass(frozen=True)
class Parent:
    """The checkpoint that an attempt continues from, fetched and verified."""

    checkpoint: CheckpointRef
    folder: Path
    manifest: Manifest


def _claim(run: Run, attempt: int, group: Group, folder: Path) -> Parent | None:
    """Return the checkpoint to continue from: rank 0 picks it and writes `start.json`, the other ranks read that."""
    parent = None
    if group.rank == 0:
        parent = _newest_complete(run, folder)
        run.start_attempt(attempt, parent.checkpoint if parent else None, group.world_size)
    if dist.is_initialized():
        dist.barrier()
    if group.rank == 0:
        return parent
    ref = run.chain()[-1].parent
    return _fetch(run, ref, folder) if ref else None


def _newest_complete(run: Run, folder: Path) -> Parent | None:
    for ref in reversed(run.checkpoints()):
        try:
            return _fetch(run, ref, folder)
        except CheckpointError:
            continue  # damaged, or deleted meanwhile: take the checkpoint before it
    return None


def _fetch(run: Run, ref: CheckpointRef, folder: Path) -> Parent:
    target = folder / f"{ref.attempt}-{ref.step}"
    target.mkdir()
    return Parent(ref, target, checkpoint.fetch(run.storage, run.checkpoint_prefix(ref), target))
