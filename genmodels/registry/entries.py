"""Describe a model as the catalogue keeps it, and read that from the model's versions and aliases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pydantic import Field

from genmodels.checkpoint import CheckpointRef
from genmodels.errors import CheckpointError, DamagedObject, ModelNotFound
from genmodels.registry.evaluations import newest
from genmodels.registry.serving import Serving, read_serving
from genmodels.registry.versions import VersionReader
from genmodels.runs.jobs import JobId
from genmodels.runs.records import GateResult
from genmodels.storage import Document, Time

Numbers = dict[str, float | None]  # metrics by name; None: not finite, which would not equal itself


class EvaluationSummary(Document):
    """The newest evaluation of a version, without its notes and baselines."""

    id: str
    created: Time
    thorough: bool
    metrics: Numbers


class VersionSummary(Document):
    """What lists and checks of requests need to know of a version. Its files are in its own document."""

    version: int
    family: str
    serving: Serving
    bytes: int  # of its files
    gate: GateResult | None
    metrics: Numbers
    created: Time
    job: JobId
    checkpoint: CheckpointRef
    pool: str = "default"
    evaluation: EvaluationSummary | None = None


class ModelEntry(Document):
    """A model. `versions` has those that an alias names and the latest, except those in `damaged`."""

    model: str
    aliases: dict[str, int]
    ranges: list[tuple[int, int]] = Field(min_length=1)  # the first and the last of adjacent version numbers
    versions: dict[int, VersionSummary]
    damaged: dict[str, str] = Field(default_factory=dict)  # by alias or number: why it cannot be read or served

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of all versions, including damaged ones, ascending."""
        return [number for first, last in self.ranges for number in range(first, last + 1)]

    @property
    def latest(self) -> int:
        return self.ranges[-1][1]

    @property
    def count(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)

    @property
    def problem(self) -> str | None:
        """Return the first reason why an alias or a version cannot be read."""
        return next(iter(self.damaged.values()), None)

    def number(self, reference: str) -> int | None:
        """Return the number of the version that an alias, a number or `latest` names; None if there is none."""
        if reference.isdecimal():
            number = int(reference)
            return number if any(first <= number <= last for first, last in self.ranges) else None
        return self.latest if reference == "latest" else self.aliases.get(reference)


def read_entry(truth: VersionReader, model: str, known: ModelEntry | None = None) -> ModelEntry | None:
    """Read a model from its versions and aliases; return None if it has no version.

    Args:
        known: an earlier entry, for a model that only got versions since. Those in it are not read again.
    """
    later = truth.versions(model, after=known.latest if known else 0)
    numbers = [*known.numbers, *later] if known else later
    if not numbers:
        return None
    aliases, damaged = _read_aliases(truth, model)
    versions = {}
    for number in sorted({*aliases.values(), numbers[-1]}):
        try:
            versions[number] = _read_version(truth, model, number, known.versions.get(number) if known else None)
        except ModelNotFound:
            continue  # an alias that names no version, or a version deleted just now
        except (DamagedObject, CheckpointError) as error:
            damaged[str(number)] = str(error)
    return ModelEntry(model=model, aliases=aliases, ranges=_ranges(numbers), versions=versions, damaged=damaged)


def _read_aliases(truth: VersionReader, model: str) -> tuple[dict[str, int], dict[str, str]]:
    """Return the version of each alias, and the reasons why others cannot be read."""
    aliases, damaged = {}, {}
    for name in truth.alias_names(model):
        try:
            aliases[name] = truth.alias(model, name).version
        except ModelNotFound:
            continue  # removed just now
        except DamagedObject as error:
            damaged[name] = str(error)
    return aliases, damaged


def _read_version(truth: VersionReader, model: str, number: int, known: VersionSummary | None) -> VersionSummary:
    summary = known or _summarize(truth, model, number)
    evaluation = newest(truth, model, number)
    if evaluation is None:
        return summary.model_copy(update={"evaluation": None})
    metrics = _finite({name: metric.value for name, metric in evaluation.metrics.items()})
    about = {"id": evaluation.id, "created": evaluation.created, "thorough": evaluation.thorough}
    return summary.model_copy(update={"evaluation": EvaluationSummary(**about, metrics=metrics)})


def _summarize(truth: VersionReader, model: str, number: int) -> VersionSummary:
    version = truth.version(model, number)
    return VersionSummary(
        version=number,
        family=version.family,
        serving=version.serving or read_serving(truth.storage, truth.keys(version), version.files),
        bytes=sum(file.size for file in version.files.values()),
        gate=version.gate,
        metrics=_finite(version.metrics),
        created=version.created,
        job=version.job,
        checkpoint=version.checkpoint,
        pool=version.pool,
    )


def _finite(metrics: Mapping[str, float]) -> Numbers:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        first = ranges.pop()[0] if ranges and ranges[-1][1] == number - 1 else number
        ranges.append((first, number))
    return ranges
