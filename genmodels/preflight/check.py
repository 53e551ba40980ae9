"""Check a whole job before anything of it trains: data, shapes, batches, workers and devices of all its models.

One function for `validate`, `run`, submission and dry run. What a person has not chosen and what does not fit small
data, the batch size, is chosen here; everything else that an attempt would fail with is an error now.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from genmodels import models
from genmodels.data import DataConfig
from genmodels.data.facts import Facts, facts_of
from genmodels.data.text import check_block_size
from genmodels.errors import DataError, SpecError
from genmodels.preflight import servable
from genmodels.registry import init_from
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage


@dataclass
class Checked:
    """A job that can train, and what is to be said of it."""

    job: JobSpec
    notes: dict[str, list[str]] = field(default_factory=dict)  # by model: what was chosen, what to expect
    facts: dict[str, Facts] = field(default_factory=dict)  # by model


def check_job(
    job: JobSpec,
    storage: Storage,
    *,
    open_data: bool = False,
    only: Collection[str] | None = None,
    capacity: Mapping[str, int] | None = None,
    planned: bool = False,
) -> Checked:
    """Return the job with a batch size that fits, where none was given.

    Args:
        open_data: open all data, and what `init_from` names, as is right where it trains at once; else only what lies
            under a path.
        only: the models that are to be trained; what is wrong with others is not told.
        capacity: the most `cpus` and `gpus` that there are, where that is known.
        planned: a plan follows, which tells by itself what does not fit the cluster or a model host.

    Raises:
        SpecError: with a line for each thing that is wrong, of all models.
    """
    checked, problems, entries = Checked(job), list[str](), list[ModelSpec]()
    known: dict[str, Facts] = {}
    for place, spec in enumerate(job.models):
        wanted = only is None or spec.name in only
        try:
            facts = _facts(spec.data, storage, open_data and wanted, known)
            spec, notes = _check_model(spec, facts, storage, with_weights=open_data and wanted)
            if not planned:
                servable.check(spec, facts.info)
            checked.facts[spec.name] = facts
            checked.notes[spec.name] = [*facts.notes, *notes, *([] if planned else _devices(spec, capacity))]
        except (SpecError, DataError) as error:
            lines = error.problems if isinstance(error, SpecError) else (str(error),)
            problems += [_at(place, line) for line in lines if wanted]
        entries.append(spec)
    if problems:
        raise SpecError(*problems)
    checked.job = job.model_copy(update={"models": entries})
    return checked


def _facts(config: DataConfig, storage: Storage, open_all: bool, known: dict[str, Facts]) -> Facts:
    """Look at each dataset once, however many models name it."""
    key = f"{config.model_dump_json()} {open_all}"
    if key not in known:
        known[key] = facts_of(config, storage, open_all=open_all)
    return known[key]


def _check_model(spec: ModelSpec, facts: Facts, storage: Storage, *, with_weights: bool) -> tuple[ModelSpec, list[str]]:
    family, info = models.load(spec.family), facts.info
    family.check_kind(info)
    if spec.train.init_from is not None:
        info = init_from.check(spec, storage, info, facts.vocabulary, with_weights=with_weights)
    family.check(spec.model, info)
    block_size: int | None = getattr(spec.model, "block_size", None)
    if info.kind == "text" and block_size is not None:
        try:
            check_block_size(facts.training, block_size)
        except DataError as error:
            raise SpecError(f"model.block_size: {error}") from None
    training, validation = facts.examples(block_size)
    if validation < (workers := spec.world_sizes[-1]):
        raise SpecError(
            f"scaling.num_workers: {workers} workers need as many validation examples, there are {validation}"
        )
    return _fit_batch(spec, training)


def _fit_batch(spec: ModelSpec, examples: int) -> tuple[ModelSpec, list[str]]:
    """Choose a batch size that an epoch holds, where none was given."""
    size, workers = spec.train.batch_size, spec.scaling.num_workers
    if size <= examples:
        return spec, []
    group = workers if isinstance(workers, int) else math.lcm(workers.min, workers.max)
    parts = spec.train.accumulation_steps * group
    if not (rows := examples // parts):
        raise SpecError(
            f"scaling.num_workers: {examples} training examples are too few to share among {group} workers"
            f"{f' and {spec.train.accumulation_steps} accumulation_steps' * (parts > group)}; bring more data"
        )
    if "batch_size" in spec.train.model_fields_set:
        largest = rows * parts
        raise SpecError(
            f"train.batch_size: got {size}, expected at most the {examples} training examples there are; "
            f"write {largest} or less, or leave it out"
        )
    fitting = parts * 2 ** (rows.bit_length() - 1)
    train = spec.train.model_copy(update={"batch_size": fitting})
    note = f"train.batch_size is {fitting}, not {size}, for there are {examples} training examples"
    return spec.model_copy(update={"train": train}), [note]


def _devices(spec: ModelSpec, capacity: Mapping[str, int] | None) -> list[str]:
    what, least = "gpus" if spec.scaling.use_gpu else "cpus", spec.world_sizes[0]
    if capacity is None or least <= (there := capacity.get(what, 0)):
        return []
    unit = what.upper()[:-1]
    return [
        f"needs {least} {unit}{'s' * (least > 1)} for its workers, there are {there}: it waits until there are more"
    ]


def _at(place: int, line: str) -> str:
    """A problem of one model, with the path of the field where the line begins with one."""
    named = re.match(r"(name|model|data|train|scaling|checkpoints|serve)\b[.:]", line)
    return f"models[{place}]{'.' if named else ': '}{line}"
