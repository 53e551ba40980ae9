"""Word the errors of a spec that need more than one of its fields, e.g. a batch that the workers cannot share.

All errors of one field (type, bounds, unknown key, missing key) are worded in `genmodels.schema.field_errors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genmodels.family import Declaration
from genmodels.schema.field_errors import FieldError, nearest, show

MAX_WORKERS = 1024


def warmup_steps(steps: int, max_steps: int) -> list[FieldError]:
    """Return an error if the warm-up does not end before training."""
    if steps < max_steps:
        return []
    need = f"less than max_steps ({max_steps}); write e.g. {max_steps // 10}"
    return [FieldError(("warmup_steps",), f"got {steps}, expected {need}")]


def compiled_shards(strategy: str, *, compile: bool) -> list[FieldError]:
    """Return an error if a model is to be compiled whose weights are gathered layer by layer."""
    if strategy != "fsdp2" or not compile:
        return []
    return [FieldError(("compile",), "got true, but strategy fsdp2 cannot be compiled; write false, or strategy: ddp")]


def worker_range(smallest: int, largest: int) -> list[FieldError]:
    """Return an error if the bounds of an elastic run are in the wrong order."""
    if smallest <= largest:
        return []
    return [FieldError(("max",), f"got {largest}, expected at least min ({smallest}); swap the two")]


def gate_bound(largest: float | None, smallest: float | None) -> str | None:
    """Return an error unless a gate has exactly one bound."""
    if (largest is None) != (smallest is None):
        return None
    given = "neither max nor min" if largest is None else "both max and min"
    return f"got {given}; write one: max if smaller is better, min if larger is better"


def batch_size(size: int, accumulation_steps: int, workers: int | tuple[int, int]) -> list[FieldError]:
    """Return the errors of a batch that the workers, or a bound of their number, cannot share evenly."""
    named = f"accumulation_steps {accumulation_steps}"
    if isinstance(workers, int):
        return _indivisible(size, workers * accumulation_steps, f"scaling.num_workers {workers} x {named}")
    if size % accumulation_steps:
        return _indivisible(size, accumulation_steps, named)
    share = size // accumulation_steps
    named = f"batch_size {size}" + (f" / {named}" if accumulation_steps > 1 else "")
    return [
        FieldError(
            ("scaling", "num_workers", bound),
            f"got {number}, expected a divisor of {share} ({named}); write {_nearest_divisors(share, number)}",
        )
        for bound, number in zip(("min", "max"), workers, strict=True)
        if share % number
    ]


def dataset_kind(dataset: str | None, family: type[Declaration], kinds: Mapping[str, str]) -> list[FieldError]:
    """Return an error if the family cannot learn from the dataset; the kind of a path is checked when it is opened.

    Args:
        kinds: of all known datasets, by name.
    """
    kind = kinds.get(dataset or "", family.kind)
    if kind == family.kind:
        return []
    fitting = ", ".join(name for name in kinds if kinds[name] == family.kind)
    problem = f"got {dataset!r}, a dataset of {kind}s, but {family.family_name()} learns from {family.kind}s"
    return [FieldError(("data", "dataset"), f"{problem}; write one of {fitting}")]


def gate_metric(metric: str, family: type[Declaration]) -> list[FieldError]:
    """Return an error if the family has no such metric."""
    metrics = family.metric_names + family.evaluation_names
    if metric in metrics:
        return []
    text = f"got {show(metric)}, expected one of {', '.join(metrics)}{nearest(metric, metrics)}"
    return [FieldError(("serve", "gate", "metric"), text)]


def repeated_names(names: Sequence[str]) -> list[FieldError]:
    """Return an error for each model that has the name of an earlier one."""
    first: dict[str, int] = {}
    return [
        FieldError(("models", i, "name"), f"got {name!r}, which models[{first[name]}] already has; write another name")
        for i, name in enumerate(names)
        if first.setdefault(name, i) != i
    ]


def _indivisible(size: int, parts: int, named: str) -> list[FieldError]:
    if size % parts == 0:
        return []
    near = [n for n in (size // parts * parts, (size // parts + 1) * parts) if n]
    need = f"a multiple of {parts} ({named}); write {' or '.join(map(str, near))}"
    return [FieldError(("train", "batch_size"), f"got {size}, expected {need}")]


def _nearest_divisors(number: int, near: int) -> str:
    """Return the nearest divisors below and above a number of workers."""
    below = next(n for n in range(near, 0, -1) if number % n == 0)
    above = next((n for n in range(near, min(number, MAX_WORKERS) + 1) if number % n == 0), None)
    return f"{below} or {above}" if above else f"{below}"
