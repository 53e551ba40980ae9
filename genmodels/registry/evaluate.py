"""Evaluate a trained model on its own data: at its publication, and when `genmodels evaluate` asks for it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from genmodels import checkpoint
from genmodels.checkpoint import CheckpointRef, Lineage
from genmodels.data import open_dataset
from genmodels.errors import DataError
from genmodels.family import EvaluationData, EvaluationResult, Family, Note
from genmodels.registry import evaluations, init_from
from genmodels.runs.metric_rows import metric_rows, training_seconds
from genmodels.runs.store import Run
from genmodels.spec.sections import ModelSpec

VALIDATION_EXAMPLES = "validation_examples"  # pictures or characters; more give more exact figures
MAX_COURSE = 8  # means that show how a metric changed during training


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
    """Evaluate a model by the metrics of its family, on the CPU in float32; add facts of its training.

    Args:
        ref: the checkpoint.
        lineage: lineage of the checkpoint.
        folder: the serving files of the checkpoint, verified.
        thorough: take minutes instead of the seconds that a publication takes.
        report_progress: called every few seconds while the evaluation makes progress.

    Raises:
        DataError: the data is missing, or is not the data that the model was trained on.
    """
    family = checkpoint.load_family(folder)
    if not family.evaluation_names:
        return EvaluationResult()
    dataset = open_dataset(spec.data, run.storage)
    if dataset.digest != lineage.data_digest:
        raise DataError(
            f"data: the content has changed since {spec.name} was trained on it, so the model cannot be evaluated; "
            "restore that content, or train the model again"
        )
    init_from.adopt_tokenizer(dataset, checkpoint.read_assets(folder).get("tokenizer.json"))
    report_progress()
    result = family.evaluate(
        EvaluationData(
            train=dataset.arrays("train"),
            val=dataset.arrays("val"),
            digest=dataset.digest,
            thorough=thorough,
            report_progress=report_progress,
            cached=partial(evaluations.cached, run.storage),
        )
    )
    notes = result.notes | training(family, run, ref, lineage)
    notes[VALIDATION_EXAMPLES] = len(next(iter(dataset.arrays("val").values())))
    return result.model_copy(update={"notes": notes})


def training(family: Family[Any, Any], run: Run, ref: CheckpointRef, lineage: Lineage) -> dict[str, Note]:
    """Return the cost of a checkpoint, and the course of each tracked metric: at most `MAX_COURSE` means.

    `training_loss` is the mean over the steps of the last logged row, for models with one loss.
    """
    last: Mapping[str, Any] = {}
    courses = {name: array("d") for name in family.tracked_metrics}
    for row in takewhile(lambda row: row["step"] <= ref.step, metric_rows(run)):
        last = row if "samples" in row else last
        for name in courses.keys() & row.keys():
            courses[name].append(row[name])
    notes: dict[str, Note] = {"parameters": sum(weight.numel() for weight in family.network.parameters())}
    notes |= {"steps": ref.step, "workers": lineage.world_size}
    if last:
        notes[f"{family.unit}_seen"] = last["samples"] * (family.sequence_length or 1)
        notes["training_seconds"] = round(training_seconds(run), 1)
        if "loss" in last:
            notes["training_loss"] = round(last["loss"], 4)
    return notes | {f"{name}_over_time": _course(values) for name, values in courses.items() if values}


def _course(values: array[float]) -> list[float]:
    parts = np.array_split(values, min(MAX_COURSE, len(values)))
    return [round(float(part.mean()), 4) for part in parts]
