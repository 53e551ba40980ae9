"""Evaluate a trained model on the data it was trained on: at its publication, and whenever somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, Lineage
from genmodels.data import open_dataset
from genmodels.errors import DataError
from genmodels.family import EvaluationData, EvaluationResult, Family, Note
from genmodels.registry import evaluations, init_from
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec

VALIDATION_EXAMPLES = "validation_examples"  # pictures or characters, on which it depends how exact the figures are
COURSE = 8  # figures that tell how something went over the whole of training


def evaluate(
    run: Run,
    ref: CheckpointRef,
    spec: ModelSpec,
    lineage: Lineage,
    folder: Path,
    *,
    thorough: bool = False,
    report_progress: Callable[[], None] = lambda: None,
) -> EvaluationResult:
    """What the model's family measures of it, on the CPU in float32, and what its training was.

    Args:
        ref: the checkpoint.
        lineage: of the checkpoint.
        folder: its served files, verified.
        thorough: take minutes where a publication takes seconds.
        report_progress: called every few seconds as long as it gets on.

    Raises:
        DataError: the data is not there any more, or is not what the model was trained on.
    """
    family = checkpoint.load_family(folder)
    if not family.evaluation_names:
        return EvaluationResult()
    dataset = open_dataset(spec.data, run.storage)
    if dataset.digest != lineage.data_digest:
        raise DataError(f"data: {spec.name} was trained on other content than is there now, so it cannot be evaluated")
    init_from.adopt_tokenizer(dataset, folder)
    report_progress()
    found = family.evaluate(
        EvaluationData(
            train=dataset.arrays("train"),
            val=dataset.arrays("val"),
            digest=dataset.digest,
            thorough=thorough,
            report_progress=report_progress,
            cached=partial(evaluations.cached, run.storage),
        )
    )
    notes = found.notes | training(family, run, ref, lineage)
    notes[VALIDATION_EXAMPLES] = len(next(iter(dataset.arrays("val").values())))
    return found.model_copy(update={"notes": notes})


def training(family: Family[Any, Any], run: Run, ref: CheckpointRef, lineage: Lineage) -> dict[str, Note]:
    """What a checkpoint cost, and the course of what its family wants followed, in at most `COURSE` means.

    `training_loss` is a mean over the last steps that were logged together, of models with one loss.
    """
    rows = [row for row in run.metrics() if row["step"] <= ref.step]
    notes: dict[str, Note] = {"parameters": sum(weight.numel() for weight in family.network.parameters())}
    notes |= {"steps": ref.step, "workers": lineage.world_size}
    if logged := [row for row in rows if "samples" in row]:
        last = logged[-1]
        notes[f"{family.unit}_seen"] = last["samples"] * (family.sequence_length or 1)
        notes["training_seconds"] = round(run.training_seconds(), 1)
        if "loss" in last:
            notes["training_loss"] = round(last["loss"], 4)
    for name in family.tracked_metrics:
        if course := _course(rows, name):
            notes[f"{name}_over_time"] = course
    return notes


def _course(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = [row[name] for row in rows if name in row]
    parts = np.array_split(values, min(COURSE, len(values))) if values else []
    return [round(float(part.mean()), 4) for part in parts]
