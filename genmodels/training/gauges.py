"""Gauges of a run in training, set by rank 0 from its heartbeats and rows."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from prometheus_client import Gauge

from genmodels import metrics
from genmodels.runs.records import Heartbeat
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec
from genmodels.training.flops import StepFlops

NORM = "gradient_norm"  # a row has one for each role, with the role's prefix
SAME = {
    "learning_rate": metrics.TRAINING_LEARNING_RATE,
    "samples": metrics.TRAINING_SAMPLES,
    "samples_per_second": metrics.TRAINING_SAMPLES_PER_SECOND,
    "step_seconds": metrics.TRAINING_STEP_SECONDS,
    "data_share": metrics.TRAINING_DATA_WAIT,
}
NOT_SHOWN = ("step", "epoch", "seconds")


class TrainingGauges:
    """The gauges of one run. They vanish with this process."""

    def __init__(
        self, run: Run, spec: ModelSpec, workers: int, tokens: int | None, step_flops: StepFlops | None
    ) -> None:
        """Args:
        tokens: tokens in one example; None for images.
        """
        self._labels = run.job, run.model, spec.family
        self._workers, self._tokens, self._step_flops = workers, tokens, step_flops
        self._set(metrics.TRAINING_WORKERS, workers)

    def show_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._set(metrics.TRAINING_PROGRESS, time.time())
        self._set(metrics.TRAINING_STEP, heartbeat.step)
        self._set(metrics.TRAINING_MAX_STEPS, heartbeat.max_steps)
        if heartbeat.seconds_left is not None:
            self._set(metrics.TRAINING_ETA, heartbeat.seconds_left)

    def row(self, row: Mapping[str, float]) -> None:
        """Set the gauges from a row of the loop, by role and part of the loss."""
        roles = [name.removesuffix(NORM) for name in row if name.endswith(NORM)]  # prefixes; "" if there is one role
        for name, value in row.items():
            if name in SAME:
                self._set(SAME[name], value)
            elif name.startswith("val_"):
                self._set(metrics.TRAINING_VALIDATION, value, name)
            elif name not in NOT_SHOWN:
                prefix = next((prefix for prefix in roles if name.startswith(prefix)), "")
                self._part(prefix.removesuffix("_") or "model", name.removeprefix(prefix), value)
        if self._tokens and "samples_per_second" in row:
            self._set(metrics.TRAINING_TOKENS_PER_SECOND, row["samples_per_second"] * self._tokens)
        if self._step_flops and "step_seconds" in row:
            flops = self._step_flops.step / row["step_seconds"]
            self._set(metrics.TRAINING_FLOPS, flops)
            self._set(metrics.TRAINING_MFU, flops / (self._step_flops.peak * self._workers))
        if torch.cuda.is_initialized():
            self._set(metrics.TRAINING_GPU_MEMORY, torch.cuda.max_memory_allocated())

    def saved(self, step: int) -> None:
        """Note that the checkpoint of this step is complete."""
        self._set(metrics.TRAINING_CHECKPOINT_STEP, step)

    def _part(self, role: str, part: str, value: float) -> None:
        if part == "loss":
            self._set(metrics.TRAINING_LOSS, value, role)
        elif part == NORM:
            self._set(metrics.TRAINING_GRADIENT_NORM, value, role)
        else:
            self._set(metrics.TRAINING_PART, value, role, part)

    def _set(self, gauge: Gauge, value: float, *more: str) -> None:
        gauge.labels(*self._labels, *more).set(value)
