"""The training loop: one for all families, in one process or many, under Ray or not.

One step: each role in turn does its backward passes and its optimizer step. Then, when due: evaluate, save previews,
log, save a checkpoint. The loop writes through a `Recorder` and reads a `Split`: it imports neither storage nor Ray.

A resumed run gives the same bits as an uninterrupted run, though no RNG state is saved: each step seeds the RNG from
(seed, step, role, rank), the order of the data is a function of seed and epoch, and DistributedDataParallel keeps its
gradient buckets from the first step on.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genmodels.checkpoint import WEIGHTS, Snapshot, SnapshotMemory, optimizer_tensors
from genmodels.data import Dataset, Split, batch_indices, shard
from genmodels.errors import DataError, TrainingDiverged
from genmodels.evals.images import evenly_spaced
from genmodels.family import Batch, Family
from genmodels.runs.records import Phase
from genmodels.spec.sections import ModelSpec, TrainConfig
from genmodels.training.group import Group
from genmodels.training.resume import Parent, optimizer_file, restore, weights_file
from genmodels.training.role_trainer import RoleTrainer
from genmodels.training.sharding import gathered, is_sharded, local
from genmodels.training.shared_state import SharedState

log = logging.getLogger(__name__)

EVALUATION_ROWS = 128  # examples of one evaluation batch and rank
COMPILING_STEPS = 3  # with `compile`: the first step compiles, and the next ones where shapes turn out to vary
PREVIEW_EXAMPLES = 64


class Saver(Protocol):
    """The destination of snapshots."""

    def save(self, step: int, take: Callable[[], Snapshot]) -> None: ...


class Recorder(Saver, Protocol):
    """The destination of the loop's output, and the source of stop requests. Only rank 0 has one."""

    def report_progress(self, phase: Phase, step: int, loss: float | None = None) -> None: ...
    def log(self, row: dict[str, Any]) -> None: ...
    def sample(self, step: int, name: str, data: bytes) -> None: ...
    def should_stop(self) -> bool: ...


def train(
    spec: ModelSpec,
    family: Family[Any, Any],
    averaged: Family[Any, Any],
    dataset: Dataset,
    group: Group,
    recorder: Recorder | None,
    parent: Parent | None = None,
    part_recorder: Saver | None = None,
    initial: Family[Any, Any] | None = None,
) -> bool:
    """Train until `max_steps`, or until the recorder is asked to stop.

    Args:
        family: the model to train, freshly built.
        averaged: another instance of the same config, for the moving average (EMA) of the trained weights: these are
            evaluated, shown and saved for serving. Without `train.ema` it has the trained weights.
        recorder: on rank 0; None elsewhere.
        parent: the checkpoint to continue from.
        part_recorder: on the other ranks, if each of them saves a part of a checkpoint.
        initial: on rank 0, if the ranks share the weights: a whole model with the initial weights, which is freed.
            `family` and `averaged` then have no memory yet.

    Returns:
        True at `max_steps`; False if it stopped before, with a checkpoint at the step where it stopped.

    Raises:
        TrainingDiverged: a loss or gradient is not finite, on all ranks at the same step.
    """
    # DDP warns when every parameter was used; `find_unused_parameters` is set for another reason (see RoleTrainer).
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    config = spec.train
    averaged.network.requires_grad_(False)
    if not is_sharded(config):
        family.to(group.device)
        averaged.to(group.device)
        averaged.network.load_state_dict(family.network.state_dict())
    roles = family.roles(config)
    trainers = [RoleTrainer(role, config, group, alone=len(roles) == 1) for role in roles]
    shared = None
    if is_sharded(config):
        shared = SharedState.begin(trainers, family, averaged, initial, group, has_average=config.ema is not None)
    split, validation = (dataset.split(name, family.sequence_length) for name in ("train", "val"))
    _check_enough(split, validation, config, group)

    step = samples = 0
    if parent:
        if shared:
            shared.restore(parent)
        else:
            restore(parent, trainers, averaged, group)
        step, samples = parent.manifest.step, parent.manifest.samples
        if config.ema is None:
            _update_average(averaged.network, family.network, None, step)
    saver: Saver | None = recorder or part_recorder
    memory = SnapshotMemory(parent.files if parent else None, pinned=group.device.type == "cuda")

    total, window, started = config.max_steps * config.batch_size, MetricWindow(), time.perf_counter()
    stopping, first = False, step + 1
    while step < config.max_steps and not stopping:
        step += 1
        if recorder and config.compile and step < first + COMPILING_STEPS:
            recorder.report_progress("compiling", step - 1)
        batches = list(micro_batches(split, config, samples, group))
        window.data_fetched()
        stopping = group.from_rank_0(recorder is not None and recorder.should_stop())  # all ranks stop after this step
        progress = torch.tensor(samples / total, device=group.device)
        lr_scale = schedule(config, step)

        # ---------------- one optimizer step: each role in turn changes its own weights ----------------
        for index, trainer in enumerate(trainers):
            trainer.set_lr_scale(lr_scale)
            with gathered(*(other.loss for other in trainers if other is not trainer)):
                losses = trainer.backward(batches, progress, _seed(config.seed, step, index, group.rank))
            values = losses | {"gradient_norm": trainer.clip_gradients()}
            _check_finite(step, trainer.name, values)
            trainer.update()
            window.add(values if len(trainers) == 1 else {f"{trainer.name}_{name}": values[name] for name in values})
        if config.ema is not None:
            _update_average(averaged.network, family.network, config.ema, step)
        # ------------------------------------------------------------------------------------------------

        samples += config.batch_size
        window.step_ended(config.batch_size)
        loss = window.latest_loss()
        if recorder:
            recorder.report_progress("training", step, loss)

        last = step == config.max_steps
        saving = last or stopping or step % config.save_every == 0
        evaluating = last or (not stopping and (saving or step % config.eval_every == 0))
        row: dict[str, Any] = {}
        if config.ema is None and (evaluating or saving):
            _update_average(averaged.network, family.network, None, step)
        if evaluating:
            with gathered(averaged.network):
                row |= evaluate(averaged, validation, group, recorder, step)
                if recorder:
                    _save_previews(averaged, dataset, validation, recorder, step, config.seed)
        if evaluating or saving or step % config.log_every == 0:
            row |= window.row() | {"learning_rate": lr_scale * config.learning_rate, "samples": samples}
            row |= {"epoch": samples / len(split), "seconds": time.perf_counter() - started}
            if recorder:
                recorder.log({"step": step, **row})
            if recorder and (evaluating or saving):
                log.info("step %d of %d: %s", step, config.max_steps, _log_text(row))
            window = MetricWindow()
        if saving and recorder:
            recorder.report_progress("saving", step, loss)
        if saving and saver:
            metrics = {name: value for name, value in row.items() if name in averaged.metric_names}
            take = shared.snapshot if shared else partial(_snapshot, trainers, averaged)
            saver.save(step, partial(take, memory, step, samples, metrics))
    return step == config.max_steps


def evaluate(
    averaged: Family[Any, Any], validation: Split, group: Group, recorder: Recorder | None = None, step: int = 0
) -> dict[str, float]:
    """Return the family's metrics over the whole validation set, each example once; ranks share every batch."""
    sums: dict[str, Tensor] = {}
    rows = EVALUATION_ROWS * group.world_size
    for first in range(0, len(validation), rows):
        index = np.arange(first, min(first + rows, len(validation)))[group.rank :: group.world_size]
        if len(index) == 0:
            continue
        if recorder:
            recorder.report_progress("evaluating", step)
        with torch.no_grad():
            batch_sums = averaged.eval_step(examples(validation, index, group.device))
        sums = {name: sums[name] + value if sums else value for name, value in batch_sums.items()}
    return averaged.eval_metrics({name: group.sum(sums[name]) for name in sorted(sums)})


def schedule(config: TrainConfig, step: int) -> float:
    """Return `lr_scale`, the factor on the peak learning rates.

    It rises in a straight line over the warm-up, then stays at 1 or falls to 0 after the last step.
    """
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - 1 - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def micro_batches(split: Split, config: TrainConfig, samples: int, group: Group) -> Iterator[Batch]:
    """Yield this rank's part of the global batch that begins at sample number `samples`, micro-batch by micro-batch."""
    size = config.batch_size // config.accumulation_steps
    for first in range(samples, samples + config.batch_size, size):
        index, epoch = shard(*batch_indices(len(split), config.seed, first, size), group.rank, group.world_size)
        yield _to_tensors(split.take(index, epoch), group.device)


def examples(split: Split, index: np.ndarray, device: torch.device) -> Batch:
    """Return the examples `index` (n,) of a split as they are in epoch 0."""
    return _to_tensors(split.take(index, np.zeros_like(index)), device)


class MetricWindow:
    """Means over the steps since the last logged row."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.steps = self.samples = 0
        self.data_seconds = 0.0
        self.began = self.ended = time.perf_counter()

    def data_fetched(self) -> None:
        """Count the time since the last step's end as time spent on data."""
        self.data_seconds += time.perf_counter() - self.ended

    def add(self, values: Mapping[str, float]) -> None:
        """Add the values of one role at this step."""
        self.latest |= values
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def step_ended(self, samples: int) -> None:
        self.steps += 1
        self.samples += samples
        self.ended = time.perf_counter()

    def latest_loss(self) -> float:
        """Return the loss of the last step; with several roles, of the last role (a GAN's generator)."""
        return next(value for name, value in reversed(self.latest.items()) if name.endswith("loss"))

    def row(self) -> dict[str, float]:
        """Return the means of all values, and the speed of the steps."""
        seconds = max(self.ended - self.began, 1e-9)
        means = {name: value / self.steps for name, value in self.sums.items()}
        speed = {"samples_per_second": self.samples / seconds, "step_seconds": seconds / self.steps}
        return means | speed | {"data_share": self.data_seconds / seconds}


def _check_finite(step: int, role: str, values: Mapping[str, float]) -> None:
    """Raise TrainingDiverged before the weights are spoiled."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingDiverged(step, f"{role}: {name} = {value}")


def _to_tensors(batch: Mapping[str, np.ndarray], device: torch.device) -> Batch:
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}


def _log_text(row: Mapping[str, float]) -> str:
    """Return the losses and metrics of a row as text."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name.endswith("loss") or "val_" in name)


@torch.no_grad()
def _update_average(averaged: nn.Module, trained: nn.Module, decay: float | None, step: int) -> None:
    """Move the averaged weights towards the trained weights; without `decay`, copy the trained weights.

    The decay rises from 2/11 to `decay`, so that the average forgets the initial weights.
    """
    weight = 1.0 if decay is None else 1 - min(decay, (1 + step) / (10 + step))
    mine, theirs = ([local(parameter) for parameter in network.parameters()] for network in (averaged, trained))
    torch._foreach_lerp_(mine, theirs, weight)
    for kept, current in zip(averaged.buffers(), trained.buffers(), strict=True):
        kept.copy_(current)


def _snapshot(
    trainers: list[RoleTrainer],
    averaged: Family[Any, Any],
    memory: SnapshotMemory,
    step: int,
    samples: int,
    metrics: dict[str, float],
) -> Snapshot:
    content = {WEIGHTS: averaged.network.state_dict()}
    for trainer in trainers:
        content[weights_file(trainer.name)] = trainer.loss.state_dict()
        for i, optimizer in enumerate(trainer.optimizers):
            content[optimizer_file(trainer.name, i)] = optimizer_tensors(optimizer.state_dict())
    return Snapshot(step, samples, metrics, memory.fill(content))


def _save_previews(
    averaged: Family[Any, Any], dataset: Dataset, validation: Split, recorder: Recorder, step: int, seed: int
) -> None:
    """Save images or text that show what the model has learnt so far."""
    device = next(averaged.network.parameters()).device
    shown = examples(validation, evenly_spaced(len(validation), PREVIEW_EXAMPLES), device)
    for name, outputs in averaged.preview(shown, seed).items():
        recorder.sample(step, *dataset.preview_file(name, outputs.cpu().numpy()))


def _check_enough(split: Split, validation: Split, config: TrainConfig, group: Group) -> None:
    if len(split) < config.batch_size:
        raise DataError(
            f"train.batch_size: {config.batch_size} is more than the {len(split)} training examples there are"
        )
    if len(validation) < group.world_size:
        raise DataError(f"data: {len(validation)} validation examples are too few for {group.world_size} workers")


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
