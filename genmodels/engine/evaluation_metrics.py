"""What evaluations found of what is served, as metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable

from genmodels.metrics import VERSION_EVALUATION
from genmodels.registry.evaluations import newest
from genmodels.registry.references import ResolvedModel
from genmodels.registry.store import Registry

LOOK_SECONDS = 60.0  # between two looks for a newer evaluation of a version


class Measured:
    """For one thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._looked: dict[str, float] = {}  # when, by version

    def show(self, served: Iterable[ResolvedModel]) -> None:
        """Set the gauges to the newest evaluation of each version, which may be a minute old.

        Raises:
            StorageUnavailable: they stay as they are.
        """
        now = time.monotonic()
        for found in served:
            looked = self._looked.get(found.name)
            if found.version is None or (looked is not None and now - looked < LOOK_SECONDS):
                continue
            evaluation = newest(self._registry, found.model, found.version)
            self._looked[found.name] = now
            for name, measure in evaluation.measures.items() if evaluation else ():
                VERSION_EVALUATION.labels(found.model, found.family, str(found.version), name).set(measure.value)
