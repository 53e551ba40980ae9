"""Every metric of this library's own, named once. Series go to files in PROMETHEUS_MULTIPROC_DIR, where that is set.

An exporter on the same node reads those files; so a process that trains opens no port, and one without an exporter
keeps a few numbers in memory that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from prometheus_client import Counter, Gauge

RUN_LABELS = ("job", "model", "family")

# Counted where runs are supervised. `cause`: as in `Result.cause`, or the outcome where it has none.
ATTEMPTS = Counter("genmodels_attempts_ended_total", "Attempts of runs that ended, by cause.", ["cause"], registry=None)

# Counted by model hosts.
VERSION_LABELS = ("model", "family", "version")
SWAPPED = Counter(
    "genmodels_versions_swapped_total", "Versions that took over from an older one.", VERSION_LABELS, registry=None
)
REFUSED = Counter(
    "genmodels_versions_refused_total",
    "Versions that were not served: damaged or unfit.",
    VERSION_LABELS,
    registry=None,
)


class TrainingMetrics:
    """How far a run is, as its rank 0 shows it. The series go when that process ends."""

    def __init__(self, job: str, model: str, family: str) -> None:
        self._labels = (job, model, family)

    def step(self, step: int, loss: float | None) -> None:
        self._set("genmodels_training_step", "Optimizer steps done.", step)
        if loss is not None:
            self._set("genmodels_training_loss", "Loss of the latest step, mean over all workers.", loss)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Args:
        metrics: the latest evaluation's, e.g. `val_loss`; other rows are passed over.
        """
        for name, value in metrics.items():
            if name.startswith("val_"):
                self._set(f"genmodels_training_{name}", f"{name} of the latest evaluation.", value)

    def _set(self, name: str, help: str, value: float) -> None:
        _gauge(name, help).labels(*self._labels).set(value)


@cache
def _gauge(name: str, help: str) -> Gauge:
    # Live: a dead process's values are dropped. Not in the default registry: they are read from the files alone.
    return Gauge(name, help, RUN_LABELS, registry=None, multiprocess_mode="livemostrecent")
