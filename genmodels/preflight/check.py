"""Check a whole job before it trains: data, shapes, batches, workers and devices of all its models.

`validate`, `run`, submission and dry run use the same function. If the default batch size does not fit small data, a
fitting one is chosen here; everything else that would make an attempt fail is an error.
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
from genmodels.preflight import servable, trainable
from genmodels.registry import init_from
from genmodels.spec.sections import JobSpec, ModelSpec
from genmodels.storage import Storage


@dataclass
class Checked:
    """Hold a job that can train, with notes for the user and facts of its data."""

    job: JobSpec
    notes: dict[str, list[str]] = field(default_factory=dict)  # by model: choices and warnings
    facts: dict[str, Facts] = field(default_factory=dict)  # by model


def check_job(
    job: JobSpec,
    storage: Storage,
    *,
    open_data: bool = False,
    only: Collection[str] | None = None,
    capacity: Mapping[str, int] | None = None,
    pools: Mapping[str, int] | None = None,
    worker_memory: Mapping[str, int] | None = None,
    planned: bool = False,
) -> Checked:
    """Return the job with a batch size that fits, if the spec gives none.

    Args:
        open_data: open all data and the source of `init_from`, for a job that trains at once; else open only paths.
        only: the models to train; problems of others are not reported.
        capacity: the largest `cpus` and `gpus` of the cluster, if known.
        pools: the bytes of models that a host keeps in memory, by pool of hosts, if known.
        worker_memory: the bytes of a machine on which a worker trains, by `cpus` (without a GPU) and `gpus`, if known.
        planned: the caller makes a plan, which reports what does not fit the cluster or a model host.

    Raises:
        SpecError: with a line for each problem of all models.
    """
    checked, problems, entries = Checked(job), list[str](), list[ModelSpec]()
    known: dict[str, Facts] = {}
    for place, spec in enumerate(job.models):
        wanted = only is None or spec.name in only
        try:
            budget = servable.budget(spec, pools)
            facts = _facts(spec.data, storage, open_data and wanted, known)
            spec, notes = _check_model(spec, facts, storage, with_weights=open_data and wanted)
            if not planned:
                servable.check(spec, facts.info, budget)
                trainable.check(spec, facts.info, trainable.memory_for(spec, worker_memory), spec.world_sizes[0])
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
    """Return the facts of a dataset; read each dataset once for all models."""
    key = f"{config.model_dump_json()} {open_all}"
    if key not in known:
        known[key] = facts_of(config, storage, open_all=open_all)
    return known[key]


def _check_model(spec: ModelSpec, facts: Facts, storage: Storage, *, with_weights: bool) -> tuple[ModelSpec, list[str]]:
    family, info = models.declaration(spec.family), facts.info
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
            f"scaling.num_workers: {workers} workers need at least {workers} validation examples, but there are only "
            f"{validation}; use fewer workers or add data"
        )
    return _fit_batch(spec, training)


def _fit_batch(spec: ModelSpec, examples: int) -> tuple[ModelSpec, list[str]]:
    """Choose a batch size that is not larger than an epoch, if the spec gives none."""
    size, workers = spec.train.batch_size, spec.scaling.num_workers
    if size <= examples:
        return spec, []
    group = workers if isinstance(workers, int) else math.lcm(workers.min, workers.max)
    parts = spec.train.accumulation_steps * group
    if not (rows := examples // parts):
        raise SpecError(
            f"scaling.num_workers: {examples} training examples are too few to share among {group} workers"
            f"{f' and {spec.train.accumulation_steps} accumulation_steps' * (parts > group)}; add more data"
        )
    if "batch_size" in spec.train.model_fields_set:
        largest = rows * parts
        raise SpecError(
            f"train.batch_size: got {size}, expected at most the number of training examples, {examples}; "
            f"write {largest} or less, or leave it out"
        )
    fitting = parts * 2 ** (rows.bit_length() - 1)
    train = spec.train.model_copy(update={"batch_size": fitting})
    note = f"train.batch_size is {fitting} instead of {size}, because there are only {examples} training examples"
    return spec.model_copy(update={"train": train}), [note]


def _devices(spec: ModelSpec, capacity: Mapping[str, int] | None) -> list[str]:
    what, least = "gpus" if spec.scaling.use_gpu else "cpus", spec.world_sizes[0]
    if capacity is None or least <= (there := capacity.get(what, 0)):
        return []
    unit = what.upper()[:-1]
    return [f"needs {least} {unit}{'s' * (least > 1)} for its workers, but the cluster has {there}: it waits for more"]


def _at(place: int, line: str) -> str:
    """Return a problem with the path of its model; join it to the path of the field, if the line begins with one."""
    named = re.match(r"(name|model|data|train|scaling|checkpoints|serve)\b[.:]", line)
    return f"models[{place}]{'.' if named else ': '}{line}"
