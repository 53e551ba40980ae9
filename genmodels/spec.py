"""Job specs: what a person writes to have models trained and served.

`parse_spec` is strict, for what comes from people: each wrong field is named, with its line and a remedy. `load_stored`
is lenient, for specs in storage: it ignores unknown keys, so that an older process can read what a newer one wrote.

The sections know nothing of each other, and a family's own settings (`model`) live in the family's file; this module
puts them together and checks across them. Only a sound outline makes it import families, and torch with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    FieldSerializationInfo,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from genmodels import models, strict_yaml
from genmodels.data import DATASETS, DataConfig
from genmodels.errors import SpecError
from genmodels.explain import Problem, all_wrong, explain, nearest, show, wrong
from genmodels.family import OptimizerConfig, Section

MAX_STORED_BYTES = 1024 * 1024  # a normalised spec spells out every default

LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


def _label(name: str) -> str:
    if re.fullmatch(LABEL, name):
        return name
    near = re.sub(r"[^a-z0-9]+", "-", name.lower())[:63].strip("-")
    rule = "expected at most 63 lower-case letters, digits and '-', with no '-' at the ends"
    raise wrong(f"got {show(name)}, {rule}" + (f"; write e.g. {near}" if near else ""))


def _alias(name: str) -> str:
    if name.isdigit() or name in ("latest", "live") or name.startswith("step-"):
        raise wrong(f"got {show(name)}, which names versions, steps or the newest; write another name, e.g. production")
    return name


Label = Annotated[str, AfterValidator(_label), Field(json_schema_extra={"pattern": LABEL})]
Alias = Annotated[Label, AfterValidator(_alias)]


class TrainConfig(OptimizerConfig):
    """How a model is trained. Steps are optimizer steps; the last one always evaluates and saves."""

    max_steps: int = Field(1000, ge=1, le=10**9, description="optimizer steps in all")
    batch_size: int = Field(64, ge=1, le=2**20, description="samples in one optimizer step, over all workers together")
    accumulation_steps: int = Field(1, ge=1, le=2**20, description="forward passes that make up one optimizer step")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="the learning rate after the warm-up: kept, or down to zero at max_steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from zero")
    clip_norm: float | None = Field(None, gt=0, description="gradients of a larger norm are scaled down to it")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are served")
    seed: int = Field(0, ge=0, lt=2**32, description="the same seed and number of workers give the same weights")
    eval_every: int = Field(250, ge=1, description="steps from one evaluation on all validation data to the next")
    save_every: int = Field(500, ge=1, description="steps from one checkpoint to the next; each is evaluated too")
    log_every: int = Field(10, ge=1, description="steps from one logged training loss to the next")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights stay in float32")
    compile: bool = Field(False, description="use torch.compile; without a C compiler the run goes on uncompiled")

    @model_validator(mode="after")
    def _warms_up_in_time(self, info: ValidationInfo) -> Self:
        if self.warmup_steps < self.max_steps or _is_stored(info):
            return self
        need = f"less than max_steps ({self.max_steps}); write e.g. {self.max_steps // 10}"
        raise all_wrong([Problem(("warmup_steps",), f"got {self.warmup_steps}, expected {need}")])


class ScalingConfig(Section):
    """How many workers train a model together."""

    num_workers: int = Field(1, ge=1, le=1024, description="processes that share each batch")
    use_gpu: bool = Field(False, description="one GPU for each worker")

    @field_validator("num_workers", mode="before")
    @classmethod
    def _fixed(cls, value: object) -> object:
        if isinstance(value, dict):
            raise wrong("got a mapping; {min, max} (elastic) is not supported yet; write a whole number, e.g. 2")
        return value


class CheckpointConfig(Section):
    """Which checkpoints of a run are kept."""

    num_to_keep: int = Field(3, ge=2, le=10_000, description="the newest checkpoints kept, beside the best one")


class Gate(Section):
    """What a trained model must reach to be published; its metric also decides which checkpoint is best."""

    metric: str = Field(description="one of the family's metrics on the validation data, e.g. val_loss")
    max: float | None = Field(None, description="publish if the metric is at most this (smaller is better)")
    min: float | None = Field(None, description="publish if the metric is at least this (larger is better)")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.max is None) != (self.min is None):
            return self
        found = "neither max nor min" if self.max is None else "both max and min"
        raise wrong(f"got {found}; write one: max where smaller is better, min where larger is")


class ServeConfig(Section):
    """How a trained model is published and served."""

    alias: Alias = Field("production", description="the alias that moves to the new version")
    gate: Gate | None = Field(None, description="what the model must reach to be published; without one it always is")
    pool: Label = Field("default", description="the pool of model hosts that serves it")


class ModelSpec(Section):
    """One model of a job."""

    name: Label = Field(description="its name in the registry and at the endpoint")
    model: Section = Field(description="`family`, and the family's own settings")
    data: DataConfig = Field(description="what it learns from")
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def family(self) -> str:
        """The family's name: that of the file its `Config` lives in."""
        return type(self.model).__module__.rpartition(".")[2]

    @field_validator("model", mode="before")
    @classmethod
    def _family_settings(cls, value: object, info: ValidationInfo) -> Section:
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict):
            raise wrong(f"got {show(value)}, expected a mapping, e.g. {{family: {models.names()[0]}}}")
        settings = dict(value)
        family = settings.pop("family", None)
        if family is None:
            raise all_wrong([Problem(("family",), f"missing; write one of {', '.join(models.names())}")])
        if family not in models.names():
            raise all_wrong([Problem(("family",), models.unknown_family(family))])
        if _is_outline(info):
            return Section()
        config = models.load(family).Config
        try:
            return config.model_validate(settings, extra="ignore" if _is_stored(info) else None)
        except ValidationError as error:
            raise all_wrong(explain(error, config)) from None

    @field_validator("data", mode="before")
    @classmethod
    def _absolute_path(cls, value: object, info: ValidationInfo) -> object:
        context = info.context or {}
        path = value.get("path") if isinstance(value, dict) else None
        if not path or not isinstance(path, str) or not isinstance(value, dict) or "base" not in context:
            return value
        path, base = os.path.expanduser(path), context["base"]
        if base is None and not os.path.isabs(path):
            raise all_wrong([Problem(("path",), f"got {show(path)}, expected an absolute path")])
        return {**value, "path": os.path.abspath(os.path.join(base or "", path))}

    @field_serializer("model")
    def _with_family(self, model: Section, info: FieldSerializationInfo) -> dict[str, Any]:
        return {"family": self.family, **model.model_dump(mode=info.mode)}

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Self:
        if _is_stored(info):
            return self
        problems = self._wrong_batch_size()
        if not _is_outline(info):
            problems += self._wrong_kind() + self._wrong_metric()
        if problems:
            raise all_wrong(problems)
        return self

    def _wrong_batch_size(self) -> list[Problem]:
        size, workers, passes = self.train.batch_size, self.scaling.num_workers, self.train.accumulation_steps
        parts = workers * passes
        if size % parts == 0:
            return []
        near = [n for n in (size // parts * parts, (size // parts + 1) * parts) if n]
        need = f"a multiple of {parts} (scaling.num_workers {workers} x accumulation_steps {passes})"
        return [Problem(("train", "batch_size"), f"got {size}, expected {need}; write {' or '.join(map(str, near))}")]

    def _wrong_kind(self) -> list[Problem]:
        source, kind = DATASETS.get(self.data.dataset or ""), models.load(self.family).kind
        if source is None or source.kind == kind:  # what lies under a path is seen when it is loaded
            return []
        fitting = ", ".join(name for name, other in DATASETS.items() if other.kind == kind)
        found = f"got {source.name!r}, a dataset of {source.kind}s, but {self.family} learns from {kind}s"
        return [Problem(("data", "dataset"), f"{found}; write one of {fitting}")]

    def _wrong_metric(self) -> list[Problem]:
        gate, metrics = self.serve.gate, models.load(self.family).metric_names
        if gate is None or gate.metric in metrics:
            return []
        text = f"got {show(gate.metric)}, expected one of {', '.join(metrics)}{nearest(gate.metric, metrics)}"
        return [Problem(("serve", "gate", "metric"), text)]


class JobSpec(Section):
    """A job: models that are trained, published and served."""

    name: Label = Field(description="what to call the job; its id is this and eight hex digits")
    priority: int = Field(0, ge=-1000, le=1000, description="higher ones start first")
    models: list[ModelSpec] = Field(min_length=1, max_length=100, description="what to train, each in a run of its own")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        first: dict[str, int] = {}
        problems = [
            Problem(("models", i, "name"), f"got {model.name!r}, as models[{first[model.name]}] has; write another")
            for i, model in enumerate(self.models)
            if first.setdefault(model.name, i) != i
        ]
        if problems:
            raise all_wrong(problems)
        return self


def read_spec(path: Path) -> JobSpec:
    """The spec in a person's file; a relative `data.path` in it is relative to the file's folder.

    Raises:
        SpecError: the file cannot be read, or is no sound spec.
    """
    try:
        with path.open("rb") as file:
            data = file.read(strict_yaml.MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; write the path of a job spec, e.g. jobs/quickstart.yaml") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: a directory; write the path of a job spec in it") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_spec(data, str(path), path.absolute().parent)


def parse_spec(data: bytes, source: str, base: Path | None = None) -> JobSpec:
    """The spec that a person wrote, in YAML or JSON.

    Args:
        source: what to call the document in messages, e.g. the file's name.
        base: the folder that a relative `data.path` is relative to; without one it must be absolute.

    Raises:
        SpecError: with a line `source:line: path: what was found, what would be right` for each problem.
    """
    document = strict_yaml.read(data, source)
    for outline in (True, False):  # what can be told without torch is told at once
        spec = _validate(document, source, {"base": base, "outline": outline})
    return spec


def load_stored(data: bytes) -> JobSpec:
    """A spec as `dump` wrote it, maybe in another release: unknown keys are ignored, sections not checked again.

    Raises:
        SpecError: it is no spec, or holds values that this release does not know.
    """
    return _validate(strict_yaml.read(data, "stored spec", MAX_STORED_BYTES), "stored spec", {"stored": True})


def dump(spec: JobSpec) -> bytes:
    """The normalised spec in YAML: every default spelled out, paths absolute."""
    return strict_yaml.write(spec.model_dump(mode="json"))


def digest(spec: JobSpec) -> str:
    """The sha256, in hex, of what the spec means: whatever the order of keys, and defaults written out or not."""
    return _sha256(spec)


def model_digest(model: ModelSpec) -> str:
    """As `digest`, of one model's part."""
    return _sha256(model)


def job_id(spec: JobSpec) -> str:
    """`<name>-<8 hex>`, the same for the same spec."""
    return f"{spec.name}-{digest(spec)[:8]}"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of job specs, for editors. Imports all families."""
    schema = JobSpec.model_json_schema()
    choices = []
    for name in models.names():
        family = models.load(name)
        choice = family.Config.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        schema["$defs"].update({f"{name}.{key}": value for key, value in choice.pop("$defs", {}).items()})
        choice["title"] = name
        choice["properties"] = {"family": {"const": name}, **choice.get("properties", {})}
        choice["required"] = ["family", *choice.get("required", [])]
        choices.append(choice)
    model = schema["$defs"]["ModelSpec"]["properties"]["model"]
    schema["$defs"]["ModelSpec"]["properties"]["model"] = {"description": model["description"], "oneOf": choices}
    schema["$defs"].pop("Section", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _validate(document: strict_yaml.Document, source: str, context: dict[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(
            document.value, context=context, extra="ignore" if context.get("stored") else None
        )
    except ValidationError as error:
        problems, more = explain(error, JobSpec), error.error_count()
    lines = sorted((_line(document, problem), f"{problem}") for problem in problems)
    said = [f"{source}:{line}: {text}" for line, text in lines]
    raise SpecError(*said, *([f"{source}: and {more - len(said)} more"] if more > len(said) else []))


def _line(document: strict_yaml.Document, problem: Problem) -> int:
    """The line of the nearest thing that is in the document."""
    ways_up = (problem.loc[:n] for n in range(len(problem.loc), -1, -1))
    return next(document.lines[loc] for loc in ways_up if loc in document.lines)


def _is_outline(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("outline"))


def _is_stored(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("stored"))


def _sha256(section: Section) -> str:
    return hashlib.sha256(json.dumps(section.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
