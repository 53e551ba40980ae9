"""Export the newest evaluations of the served versions as metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable

from genmodels.metrics import EVALUATION_METRIC
from genmodels.registry.evaluations import newest
from genmodels.registry.references import ResolvedModel
from genmodels.registry.store import Registry

REFRESH_SECONDS = 60.0  # a version's evaluations are read again after so long


class EvaluationMetrics:
    """Set the gauges of evaluations. Not thread-safe."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._read: dict[str, float] = {}  # monotonic time by version

    def update(self, models: Iterable[ResolvedModel]) -> None:
        """Set the gauges to the newest evaluation of each version; they may be REFRESH_SECONDS old.

        Raises:
            StorageUnavailable: the gauges keep their values.
        """
        now = time.monotonic()
        for model in models:
            read = self._read.get(model.name)
            if model.version is None or (read is not None and now - read < REFRESH_SECONDS):
                continue
            evaluation = newest(self._registry, model.model, model.version)
            self._read[model.name] = now
            for name, metric in evaluation.metrics.items() if evaluation else ():
                EVALUATION_METRIC.labels(model.model, model.family, str(model.version), name).set(metric.value)
