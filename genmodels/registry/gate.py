"""Check a gate against metrics, and choose the checkpoint to publish."""

from __future__ import annotations

import math

from genmodels.checkpoint import CheckpointRef, Manifest
from genmodels.runs.records import GateResult
from genmodels.spec.sections import Gate


def check_gate(gate: Gate | None, metrics: dict[str, float]) -> GateResult | None:
    """Return whether metrics pass a gate, and why; None without a gate."""
    if gate is None:
        return None
    value = metrics.get(gate.metric, math.nan)
    if gate.max is not None:
        reached, bound = value <= gate.max, f"<= {gate.max:g}"
    else:
        assert gate.min is not None
        reached, bound = value >= gate.min, f">= {gate.min:g}"
    passed = reached and math.isfinite(value)
    reason = f"{gate.metric} {value:.4g} is {'' if passed else 'not '}{bound}"
    return GateResult(metric=gate.metric, value=value, passed=passed, reason=reason)


def best(gate: Gate | None, candidates: list[tuple[CheckpointRef, Manifest]]) -> tuple[CheckpointRef, Manifest]:
    """Return the checkpoint to publish: the best by the metric of the gate if one is finite, else the last."""
    if gate is None:
        return candidates[-1]
    sign = 1 if gate.max is not None else -1
    scores = [sign * manifest.metrics.get(gate.metric, math.nan) for _, manifest in candidates]
    finite = [(score, i) for i, score in enumerate(scores) if math.isfinite(score)]
    return candidates[min(finite)[1]] if finite else candidates[-1]
