"""One attempt of a run, as each worker of its group executes it: find the checkpoint, claim the attempt, train.

It is the same under Ray, in plain processes with a process group, and in a single process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels import __version__, checkpoint, metrics, models
from genmodels.checkpoint import Lineage
from genmodels.data import Dataset, open_dataset
from genmodels.evals.images import evenly_spaced
from genmodels.family import Batch, Family
from genmodels.preflight import trainable
from genmodels.registry import init_from
from genmodels.runs.control import CommandWatcher, HangWatcher
from genmodels.runs.jobs import Jobs
from genmodels.runs.logs import LogShipper
from genmodels.runs.records import Heartbeat
from genmodels.runs.store import Run
from genmodels.sizing.machine import memory_limit
from genmodels.sizing.outline import shapes_only
from genmodels.spec.parse import model_digest
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage
from genmodels.storage.disk import disk_outages
from genmodels.training import flops
from genmodels.training.group import Group, SideGroup
from genmodels.training.loop import examples, train
from genmodels.training.part_recorder import PartRecorder
from genmodels.training.recorder import RunRecorder
from genmodels.training.resume import Parent, claim
from genmodels.training.sharding import is_sharded

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
    models.load(spec.family).check(spec.model, dataset.info)
    sharded = is_sharded(spec.train)
    if group.rank == 0:
        trainable.check(spec, dataset.info, memory_limit(), group.world_size)
    parent = claim(run, attempt, group, sharded=sharded)
    begins = (
        f"continues from step {parent.checkpoint.step} of attempt {parent.checkpoint.attempt}" if parent else "begins"
    )
    log.info("attempt %d, rank %d of %d: %s", attempt, group.rank, group.world_size, begins)
    with checkpoint.scratch_folder() as folder:
        source = _adopt_tokenizer(spec, dataset, run, group, parent, Path(folder))
        scratch = _without_weights(build(spec, dataset)) if group.rank == 0 else None  # freed before the next is built
        family, averaged, initial = _build_models(spec, dataset, group, source)
    side_group = SideGroup() if sharded else None
    if scratch is None and side_group is None:
        return train(spec, family, averaged, dataset, group, None, parent)
    if scratch is None:
        assert side_group is not None
        with PartRecorder(run, attempt, side_group) as part_recorder:
            return train(spec, family, averaged, dataset, group, None, parent, part_recorder)
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
        side_group,
    ) as recorder:
        return train(spec, family, averaged, dataset, group, recorder, parent, initial=initial)


def _adopt_tokenizer(
    spec: ModelSpec, dataset: Dataset, run: Run, group: Group, parent: Parent | None, folder: Path
) -> Path | None:
    """Give the dataset the tokenizer of the model that training continues or starts from.

    Returns:
        The folder with the model that `train.init_from` names, of which only rank 0 has the weights.
    """
    if parent:
        init_from.adopt_tokenizer(dataset, parent.tokenizer)
        return None
    source = init_from.fetch(spec, run.storage, folder / "source", with_weights=group.rank == 0)
    if source:
        init_from.adopt_tokenizer(dataset, checkpoint.read_assets(source).get("tokenizer.json"))
    return source


def _build_models(
    spec: ModelSpec, dataset: Dataset, group: Group, source: Path | None
) -> tuple[Family[Any, Any], Family[Any, Any], Family[Any, Any] | None]:
    """Build the model to train and its average, and load the weights that `train.init_from` names.

    Where the ranks share the weights, both have no memory yet, and rank 0 builds the only whole model, the third.
    """
    torch.manual_seed(spec.train.seed)
    if is_sharded(spec.train):
        initial = build(spec, dataset) if group.rank == 0 else None
        if initial and source:
            init_from.load(initial, source)
        torch.manual_seed(spec.train.seed)  # the ranks must agree on what a family may draw later
        with shapes_only():
            return build(spec, dataset), build(spec, dataset), initial
    family, averaged = (build(spec, dataset) for _ in range(2))
    if source:
        if group.rank == 0:
            init_from.load(family, source)
        for tensor in family.network.state_dict().values():
            group.receive(tensor, None)
    return family, averaged, None


def build(spec: ModelSpec, dataset: Dataset) -> Family[Any, Any]:
    """Build a fresh model for a dataset.

    Raises:
        SpecError: the family cannot work on the dataset.
    """
    cls = models.load(spec.family)
    cls.check(spec.model, dataset.info)
    return cls(spec.model, dataset.info)


def _without_weights(family: Family[Any, Any]) -> Family[Any, Any]:
    """Free the weights of a model that gets others before it is used: those of each snapshot, which are not copied."""
    for network in family.networks().values():
        network.load_state_dict({name: one.to("meta") for name, one in network.state_dict().items()}, assign=True)
    return family


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
