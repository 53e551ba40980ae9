"""THE training loop: every family, one process or many, under Ray or not.

One step: each role in turn takes a batch, a backward pass and an optimizer step. Then, when due: evaluate, show
samples, log, save. The loop writes through a `Recorder` and reads a `Split`, so it knows neither storage nor Ray.

Resume is exact: each step reseeds from (seed, step, role, rank), the order of the data is a function of seed and
epoch, and DistributedDataParallel keeps its gradient buckets from the first step on. So no RNG state is saved.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genmodels.checkpoint import WEIGHTS, Manifest, Snapshot, load_optimizer, load_tensors, optimizer_tensors
from genmodels.data import Dataset, Split, TextData, batch_indices, shard
from genmodels.data.images import grid, png
from genmodels.errors import DataError, TrainingDiverged
from genmodels.evals.images import evenly_spaced
from genmodels.family import Batch, Family, ImageFamily, Role, TextFamily
from genmodels.runs.records import Phase
from genmodels.spec.sections import ModelSpec, TrainConfig

log = logging.getLogger(__name__)

EVALUATION_ROWS = 128  # examples of one evaluation batch and rank
COMPILING_STEPS = 3  # with `compile`: the first step compiles, and the next ones where shapes turn out to vary
PREVIEW_IMAGES = 64
PREVIEW_TOKENS = 200


@dataclass(frozen=True)
class Group:
    """This process's place among the workers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Recorder(Protocol):
    """What the loop tells the world, and the one thing it asks. Only rank 0 has one."""

    def report_progress(self, phase: Phase, step: int, loss: float | None = None) -> None: ...
    def log(self, row: dict[str, Any]) -> None: ...
    def sample(self, step: int, name: str, data: bytes) -> None: ...
    def save(self, snapshot: Snapshot) -> None: ...
    def should_stop(self) -> bool: ...


class RoleTrainer:
    """A role in training: its loss module behind DistributedDataParallel, and its optimizers with their peak rates."""

    def __init__(self, role: Role, compile: bool) -> None:
        self.name, self.loss, self.optimizers = role.name, role.loss, role.optimizers
        self.parameters = [p for p in role.loss.parameters() if p.requires_grad]
        self.peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in role.optimizers]
        if compile:
            _compile(role)
        # Buckets are rebuilt after the first step unless unused parameters are looked for; a resumed run would then
        # add gradients in another order and differ in its last bits from one that was not interrupted.
        self.call: nn.Module = (
            DistributedDataParallel(role.loss, find_unused_parameters=True) if dist.is_initialized() else role.loss
        )

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        return self.call.no_sync() if isinstance(self.call, DistributedDataParallel) else contextlib.nullcontext()

    def set_rate(self, factor: float) -> None:
        for optimizer, rates in zip(self.optimizers, self.peak_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor


def train(
    spec: ModelSpec,
    family: Family[Any, Any],
    served: Family[Any, Any],
    dataset: Dataset,
    group: Group,
    recorder: Recorder | None,
    resume: tuple[Path, Manifest] | None = None,
) -> bool:
    """Train until `max_steps`, or until the recorder is asked to stop.

    Args:
        family: the model to train, freshly built.
        served: another instance of the same config; it takes the weights that are evaluated, shown and saved to be
            served (the EMA where the spec asks for one).
        recorder: on rank 0; None elsewhere.
        resume: a verified checkpoint's folder and manifest.

    Returns:
        True at `max_steps`; False if it stopped before, with a checkpoint at the step where it stopped.

    Raises:
        TrainingDiverged: a loss or gradient is not finite, on all ranks at the same step.
    """
    # Said once by DDP when every parameter was used; the flag is there for another reason (see RoleTrainer).
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    config = spec.train
    family.to(group.device)
    served.to(group.device)
    served.network.requires_grad_(False)
    players = [RoleTrainer(role, config.compile) for role in family.roles(config)]
    window = family.block_size if isinstance(family, TextFamily) else None
    split, validation = dataset.split("train", window), dataset.split("val", window)
    _check_enough(split, validation, config, group)

    step = samples = 0
    served.network.load_state_dict(family.network.state_dict())
    if resume:
        folder, manifest = resume
        _restore(folder, players, served)
        step, samples = manifest.step, manifest.samples

    total, interval, started = config.max_steps * config.batch_size, MetricWindow(), time.perf_counter()
    stopping, first = False, step + 1
    while step < config.max_steps and not stopping:
        step += 1
        if recorder and config.compile and step < first + COMPILING_STEPS:
            recorder.report_progress("compiling", step - 1)
        progress = torch.tensor(samples / total, device=group.device)
        rate = schedule(config, step)
        batches = list(micro_batches(split, config, samples, group))
        interval.fetched()
        stop_requested = recorder is not None and recorder.should_stop()
        for index, player in enumerate(players):
            player.set_rate(rate)
            seed = _seed(config.seed, step, index, group.rank)
            values, stop_requested = _optimize(player, batches, progress, config, step, seed, group, stop_requested)
            interval.add(
                {name if len(players) == 1 else f"{player.name}_{name}": value for name, value in values.items()}
            )
        stopping = stop_requested  # summed over all ranks on the way: all ranks stop at the same step
        samples += config.batch_size
        _average(served.network, family.network, config.ema, step)
        interval.stepped(config.batch_size)
        loss = interval.loss()
        if recorder:
            recorder.report_progress("training", step, loss)

        last = step == config.max_steps
        saving = last or stopping or step % config.save_every == 0
        evaluating = last or (not stopping and (saving or step % config.eval_every == 0))
        row: dict[str, Any] = {}
        if evaluating:
            row |= evaluate(served, validation, group, recorder, step)
            if recorder:
                _show(served, dataset, validation, recorder, step, config.seed)
        if evaluating or saving or step % config.log_every == 0:
            row |= interval.row() | {"learning_rate": rate * config.learning_rate, "samples": samples}
            row |= {"epoch": samples / len(split), "seconds": time.perf_counter() - started}
            if recorder:
                recorder.log({"step": step, **row})
            if recorder and (evaluating or saving):
                log.info("step %d of %d: %s", step, config.max_steps, _shown(row))
            interval = MetricWindow()
        if saving and recorder:
            metrics = {name: value for name, value in row.items() if name in served.metric_names}
            recorder.report_progress("saving", step, loss)
            recorder.save(_snapshot(step, samples, metrics, players, served))
    return step == config.max_steps


def evaluate(
    served: Family[Any, Any], validation: Split, group: Group, recorder: Recorder | None = None, step: int = 0
) -> dict[str, float]:
    """The family's metrics over the whole validation set, each example once; ranks share every batch."""
    sums: dict[str, Tensor] = {}
    rows = EVALUATION_ROWS * group.world_size
    for first in range(0, len(validation), rows):
        index = np.arange(first, min(first + rows, len(validation)))[group.rank :: group.world_size]
        if len(index) == 0:
            continue
        if recorder:
            recorder.report_progress("evaluating", step)
        with torch.no_grad():
            found = served.eval_step(to_tensors(validation.take(index, np.zeros_like(index)), group.device))
        sums = {name: sums[name] + value if sums else value for name, value in found.items()}
    if dist.is_initialized():
        for name in sorted(sums):
            dist.all_reduce(sums[name])
    return served.eval_metrics(sums)


def schedule(config: TrainConfig, step: int) -> float:
    """The factor on the peak learning rate: linear warm-up, then constant, or down to zero after the last step."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - 1 - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def micro_batches(split: Split, config: TrainConfig, samples: int, group: Group) -> Iterator[Batch]:
    """This rank's part of the global batch that begins at sample number `samples`, one micro-batch after the other."""
    size = config.batch_size // config.accumulation_steps
    for first in range(samples, samples + config.batch_size, size):
        index, epoch = shard(*batch_indices(len(split), config.seed, first, size), group.rank, group.world_size)
        yield to_tensors(split.take(index, epoch), group.device)


def to_tensors(batch: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}


class MetricWindow:
    """Means over the steps since the last logged row."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.steps = self.samples = 0
        self.data_seconds = 0.0
        self.began = self.mark = time.perf_counter()
        self.ended = self.began

    def fetched(self) -> None:
        now = time.perf_counter()
        self.data_seconds += now - self.mark

    def add(self, values: Mapping[str, float]) -> None:
        self.latest |= values
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def stepped(self, samples: int) -> None:
        self.steps += 1
        self.samples += samples
        self.ended = self.mark = time.perf_counter()

    def loss(self) -> float:
        """Of the last step; of the last role where there are several (a GAN's generator)."""
        return next(value for name, value in reversed(self.latest.items()) if name.endswith("loss"))

    def row(self) -> dict[str, float]:
        seconds = max(self.ended - self.began, 1e-9)
        means = {name: value / self.steps for name, value in self.sums.items()}
        speed = {"samples_per_second": self.samples / seconds, "step_seconds": seconds / self.steps}
        return means | speed | {"data_share": self.data_seconds / seconds}


def _optimize(
    player: RoleTrainer,
    batches: list[Batch],
    progress: Tensor,
    config: TrainConfig,
    step: int,
    seed: int,
    group: Group,
    stop_requested: bool,
) -> tuple[dict[str, float], bool]:
    """One optimizer step of one role: its loss parts as means over all ranks, and whether any rank was told to stop."""
    player.loss.train()
    for optimizer in player.optimizers:
        optimizer.zero_grad(set_to_none=True)
    sums: Tensor | None = None
    names: list[str] = []
    for i, batch in enumerate(batches):
        torch.manual_seed(seed + i)
        with player.no_sync() if i < len(batches) - 1 else contextlib.nullcontext():
            with torch.autocast(group.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                losses = player.call(batch, progress)
            (losses["loss"] / len(batches)).backward()
        names = list(losses)
        parts = torch.stack([losses[name].detach().float() for name in names])
        sums = parts if sums is None else sums + parts
    assert sums is not None
    # One small collective: every rank sees the same means, the same NaN, and the same command.
    shared = torch.cat([sums / len(batches) / group.world_size, sums.new_tensor([float(stop_requested)])])
    if dist.is_initialized():
        dist.all_reduce(shared)
    *means, stops = shared.tolist()
    values = dict(zip(names, means, strict=True))
    norm = nn.utils.clip_grad_norm_(player.parameters, config.clip_norm or math.inf).item()
    for name, value in {**values, "gradient_norm": norm}.items():
        if not math.isfinite(value):
            raise TrainingDiverged(step, f"{player.name}: {name} = {value}")
    for optimizer in player.optimizers:
        optimizer.step()
    return values | {"gradient_norm": norm}, stops > 0


def _shown(row: Mapping[str, float]) -> str:
    """Losses and metrics for people."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name.endswith("loss") or "val_" in name)


@torch.no_grad()
def _average(served: nn.Module, trained: nn.Module, decay: float | None, step: int) -> None:
    """Move the served weights towards the trained ones. The average forgets its start: short at first, then `decay`."""
    weight = 1.0 if decay is None else 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(served.parameters()), list(trained.parameters()), weight)
    for mine, theirs in zip(served.buffers(), trained.buffers(), strict=True):
        mine.copy_(theirs)


def _snapshot(
    step: int, samples: int, metrics: dict[str, float], players: list[RoleTrainer], served: Family[Any, Any]
) -> Snapshot:
    return Snapshot(
        step=step,
        samples=samples,
        metrics=metrics,
        serving_weights=_copy(served.network.state_dict()),
        roles={player.name: _copy(player.loss.state_dict()) for player in players},
        optimizers={player.name: [optimizer_tensors(o.state_dict()) for o in player.optimizers] for player in players},
    )


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _restore(folder: Path, players: list[RoleTrainer], served: Family[Any, Any]) -> None:
    served.network.load_state_dict(load_tensors(folder / WEIGHTS))
    for player in players:
        player.loss.load_state_dict(load_tensors(folder / "state" / f"{player.name}.safetensors"))
        for i, optimizer in enumerate(player.optimizers):
            load_optimizer(optimizer, load_tensors(folder / "state" / f"{player.name}.optimizer-{i}.safetensors"))


def _show(
    served: Family[Any, Any], dataset: Dataset, validation: Split, recorder: Recorder, step: int, seed: int
) -> None:
    """Leave pictures or text behind to look at while training goes on."""
    if isinstance(served, ImageFamily):
        index = evenly_spaced(len(validation), PREVIEW_IMAGES)
        device = next(served.network.parameters()).device
        images = torch.from_numpy(validation.take(index, np.zeros_like(index))["images"]).to(device)
        for name, pictures in served.preview(images, seed).items():
            recorder.sample(step, f"{name}.png", png(grid(pictures.clamp(0, 1).cpu().numpy())))
    elif isinstance(served, TextFamily) and isinstance(dataset, TextData):
        prompt = dataset.val[:1].tolist()
        tokens = list(itertools.islice(served.generate(prompt, seed, served.Request()), PREVIEW_TOKENS))
        recorder.sample(step, "sample.txt", dataset.tokenizer.decode(tokens).encode())


def _check_enough(split: Split, validation: Split, config: TrainConfig, group: Group) -> None:
    if len(split) < config.batch_size:
        raise DataError(
            f"train.batch_size: {config.batch_size} is more than the {len(split)} training examples there are"
        )
    if len(validation) < group.world_size:
        raise DataError(f"data: {len(validation)} validation examples are too few for {group.world_size} workers")


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _compile(role: Role) -> None:
    if not role.compilable:
        log.warning("train.compile: role %s stays uncompiled (its loss differentiates a gradient)", role.name)
        return
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        log.warning("train.compile: no C++ compiler on this machine; role %s stays uncompiled", role.name)
        return
    role.loss.compile()
