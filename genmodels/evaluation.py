"""Evaluate a trained model on the data it was trained on: at its publication, and whenever somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from genmodels import checkpoint, findings, initial
from genmodels.checkpoint import Lineage
from genmodels.data import open_dataset
from genmodels.errors import DataError
from genmodels.family import Findings, Material
from genmodels.spec import ModelSpec
from genmodels.storage import Storage


def evaluate(
    storage: Storage,
    spec: ModelSpec,
    lineage: Lineage,
    folder: Path,
    *,
    thorough: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Findings:
    """What the model's family measures of it, on the CPU in float32.

    Args:
        lineage: of the checkpoint.
        folder: its served files, verified.
        thorough: take minutes where a publication takes seconds.
        tick: called every few seconds as long as it gets on.

    Raises:
        DataError: the data is not there any more, or is not what the model was trained on.
    """
    family = checkpoint.load_family(folder)
    if not family.evaluation_names:
        return Findings()
    dataset = open_dataset(spec.data, storage)
    if dataset.digest != lineage.data_digest:
        raise DataError(f"data: {spec.name} was trained on other content than is there now, so it cannot be evaluated")
    initial.adopt_tokenizer(dataset, folder)
    tick()
    return family.evaluate(
        Material(
            train=dataset.arrays("train"),
            val=dataset.arrays("val"),
            digest=dataset.digest,
            thorough=thorough,
            tick=tick,
            keep=partial(findings.keep, storage),
        )
    )
