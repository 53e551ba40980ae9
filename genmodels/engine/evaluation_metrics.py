"""Export the newest evaluations of the served versions as metrics."""

from __future__ import annotations

from collections.abc import Iterable

from genmodels.metrics import EVALUATION_METRIC
from genmodels.registry.catalogue import CatalogueReader
from genmodels.registry.references import ResolvedModel


class EvaluationMetrics:
    """Set the gauges of evaluations. Not thread-safe."""

    def __init__(self, catalogue: CatalogueReader) -> None:
        self._catalogue = catalogue
        self._shown: dict[str, str] = {}  # id of the evaluation by version

    def update(self, models: Iterable[ResolvedModel]) -> None:
        """Set the gauges to the newest evaluation of each version that the catalogue has."""
        for model in models:
            entry = self._catalogue.get(model.model)
            summary = entry.versions.get(model.version) if entry and model.version else None
            evaluation = summary.evaluation if summary else None
            if evaluation is None or self._shown.get(model.name) == evaluation.id:
                continue
            self._shown[model.name] = evaluation.id
            for name, value in evaluation.metrics.items():
                number = float("nan") if value is None else value
                EVALUATION_METRIC.labels(model.model, model.family, str(model.version), name).set(number)
