"""Read the value of a metric of this process."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase


def series(metric: MetricWrapperBase) -> dict[tuple[str, ...], float]:
    """Return label values, in order of the labels' names -> value; of histograms the number of observations."""
    (family,) = metric.collect()
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for sample in family.samples
        if sample.name.endswith(("_total", "_count")) or sample.name == family.name
    }


def value(metric: MetricWrapperBase, *labels: str) -> float:
    """Return the value of a series; 0 if nothing was counted yet."""
    return series(metric).get(labels, 0.0)
