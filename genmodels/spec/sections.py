"""Define the sections of a job spec, in which a user asks for models to be trained and served.

`parse_spec` is strict, for specs of users: it names each wrong field, with its line and a remedy. `load_stored` is
lenient, for specs in storage: it ignores unknown keys, so that an older process can read newer specs.

The sections do not depend on each other, and the settings of a family (`model`) are in the file of the family; this
module combines them, and `cross_field_errors` words the problems that need more than one of them. It imports the
declarations of families, and torch with a family that has no file for them, only for a valid outline.
"""

from __future__ import annotations

import os
import re
from collections import ChainMap
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    Field,
    FieldSerializationInfo,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from genmodels import models
from genmodels.data import DATASETS, DataConfig, uploads
from genmodels.data.files import shown
from genmodels.family import OptimizerConfig
from genmodels.schema.base import Section
from genmodels.schema.field_errors import (
    FieldError,
    Loc,
    field_error,
    field_errors,
    format_errors,
    sections_of,
    show,
)
from genmodels.spec import cross_field_errors
from genmodels.spec.names import Alias, Label, Reference

SectionT = TypeVar("SectionT", bound=Section)


def _is_outline(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("outline"))


def _is_stored(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("stored"))


def _kinds(info: ValidationInfo) -> Mapping[str, uploads.Kind]:
    """Return the kinds of built-in and added datasets; a look-up lists no datasets."""
    return ChainMap({name: source.kind for name, source in DATASETS.items()}, (info.context or {}).get("datasets", {}))


def _raised(section: SectionT, problems: list[FieldError]) -> SectionT:
    """Return the section if it has no problems, else raise them."""
    if problems:
        raise field_errors(problems)
    return section


class TrainConfig(OptimizerConfig):
    """Set how a model is trained. Steps are optimizer steps; the last one always evaluates and saves."""

    max_steps: int = Field(
        1000, ge=1, le=10**9, description="number of optimizer steps; the last step always evaluates and saves"
    )
    batch_size: int = Field(
        64, ge=1, le=2**20, description="samples in one optimizer step, over all workers and accumulation steps"
    )
    accumulation_steps: int = Field(1, ge=1, le=2**20, description="forward passes that make up one optimizer step")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="learning rate after the warm-up: constant, or falling to zero at max_steps"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from zero")
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the gradient; a larger gradient is scaled down"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights; if set, these weights are evaluated and served"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="the same seed and number of workers give the same weights")
    eval_every: int = Field(250, ge=1, description="steps between two evaluations on all validation data")
    save_every: int = Field(500, ge=1, description="steps between two checkpoints; each checkpoint is also evaluated")
    log_every: int = Field(10, ge=1, description="steps between two logged rows of the training loss")
    init_from: Reference | None = Field(
        None, description="start with the served weights of a version or a checkpoint, e.g. vae-digits@3"
    )
    strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="ddp: each worker holds the whole model; fsdp2: the workers share weights, gradients and optimizer "
        "states (torch's fully_shard), and each writes its own part of a checkpoint",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 uses autocast; the weights stay in float32")
    compile: bool = Field(
        False, description="use torch.compile; without a C++ compiler the run logs one warning and continues uncompiled"
    )

    @model_validator(mode="after")
    def _settings_agree(self, info: ValidationInfo) -> Self:
        if _is_stored(info):
            return self
        problems = cross_field_errors.warmup_steps(self.warmup_steps, self.max_steps)
        return _raised(self, problems + cross_field_errors.compiled_shards(self.strategy, compile=self.compile))


Workers = Annotated[int, Field(ge=1, le=cross_field_errors.MAX_WORKERS)]


class WorkerRange(Section):
    """Bound the workers of an elastic run: it starts with as many as fit, and shrinks and grows between the bounds."""

    min: Workers = Field(description="smallest number of workers the run continues with")
    max: Workers = Field(description="largest number of workers the run may grow to")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        return _raised(self, cross_field_errors.worker_range(self.min, self.max))


class ScalingConfig(Section):
    """Set how many workers train a model together."""

    num_workers: Workers | WorkerRange = Field(
        1,
        validate_default=False,  # its validator uses classes that are defined below
        description="processes that share each batch: a number, or {min, max} for a run that shrinks and grows",
    )
    use_gpu: bool = Field(False, description="one GPU for each worker")

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.min

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.max

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_form(cls, value: object, info: ValidationInfo) -> object:
        """Validate the value by its form: a union would report errors for a number and for a mapping."""
        if isinstance(value, bool) or not isinstance(value, int | float | dict | WorkerRange):
            raise field_error(
                f"got {show(value)}, expected a whole number, e.g. 2, or a range, e.g. {{min: 1, max: 4}}"
            )
        form = _Fixed if isinstance(value, int | float) else _Elastic
        try:
            settings = {"num_workers": value}
            return form.model_validate(settings, extra="ignore" if _is_stored(info) else None).num_workers
        except ValidationError as error:
            raise field_errors(
                FieldError(problem.loc[1:], problem.text) for problem in format_errors(error, form)
            ) from None


class _Fixed(Section):
    num_workers: Workers = 1


class _Elastic(Section):
    num_workers: WorkerRange


class CheckpointConfig(Section):
    """Set which checkpoints of a run are kept."""

    num_to_keep: int = Field(
        3, ge=2, le=10_000, description="how many of the newest checkpoints are kept, in addition to the best one"
    )


class Gate(Section):
    """Set the bound that a model must reach to be published; a metric of training also selects the best checkpoint.

    A metric of the evaluation is known only for the last checkpoint, so the gate checks that one.
    """

    metric: str = Field(
        description="a validation metric of the family, e.g. val_loss, or a measure of its evaluation, e.g. nll"
    )
    max: float | None = Field(None, description="publish if the metric is at most this number (lower is better)")
    min: float | None = Field(None, description="publish if the metric is at least this number (higher is better)")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if error := cross_field_errors.gate_bound(self.max, self.min):
            raise field_error(error)
        return self


class ServeConfig(Section):
    """Set how a trained model is published and served."""

    alias: Alias = Field("production", description="alias that is moved to the new version")
    gate: Gate | None = Field(
        None,
        description="bound that the model must reach to be published; without a gate the last checkpoint is published",
    )
    pool: Label = Field("default", description="pool of model hosts that serves the model")


class ModelSpec(Section):
    """Describe one model of a job."""

    name: Label = Field(description="name of the model in the registry and at the endpoint")
    model: Section = Field(description="`family`, and the settings of that family")
    data: DataConfig = Field(description="dataset that the model learns from")
    train: TrainConfig = Field(TrainConfig(), description="how the model is trained")
    scaling: ScalingConfig = Field(ScalingConfig(), description="how many workers train the model")
    checkpoints: CheckpointConfig = Field(CheckpointConfig(), description="which checkpoints are kept")
    serve: ServeConfig = Field(ServeConfig(), description="how the model is published and served")

    @property
    def family(self) -> str:
        """Return the name of the family, which is the name of the file of its `Config`."""
        return type(self.model).__module__.rpartition(".")[2]

    @property
    def world_sizes(self) -> list[int]:
        """Return the possible numbers of workers, ascending: those within the bounds that share a batch evenly."""
        share, scaling = self.train.batch_size // self.train.accumulation_steps, self.scaling
        if isinstance(scaling.num_workers, int):
            return [scaling.num_workers]
        return [n for n in range(scaling.min_workers, scaling.max_workers + 1) if share % n == 0]

    @field_validator("model", mode="before")
    @classmethod
    def _family_settings(cls, value: object, info: ValidationInfo) -> Section:
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict):
            raise field_error(f"got {show(value)}, expected a mapping, e.g. {{family: {models.names()[0]}}}")
        settings = dict(value)
        family = settings.pop("family", None)
        if family is None:
            raise field_errors([FieldError(("family",), f"missing; write one of {', '.join(models.names())}")])
        if family not in models.names():
            raise field_errors([FieldError(("family",), models.unknown_family(family))])
        if _is_outline(info):
            return Section()
        config = models.declaration(family).Config
        try:
            return config.model_validate(settings, extra="ignore" if _is_stored(info) else None)
        except ValidationError as error:
            raise field_errors(format_errors(error, config, sections_with_key)) from None

    @field_validator("data", mode="before")
    @classmethod
    def _absolute_path(cls, value: object, info: ValidationInfo) -> object:
        context = info.context or {}
        path = value.get("path") if isinstance(value, dict) else None
        if not path or not isinstance(path, str) or not isinstance(value, dict) or "base" not in context:
            return value
        if not context.get("paths", True):
            return value  # refused by DataConfig
        path, base = os.path.expanduser(path), context["base"]
        if base is None and not os.path.isabs(path):
            raise field_errors([FieldError(("path",), f"got {show(path)}, expected an absolute path")])
        path = os.path.abspath(os.path.join(base or "", path))
        if re.search("[\udc80-\udcff]", path):  # the folder of the spec may not be UTF-8, but a stored spec is
            remedy = "rename the folder, or use `genmodels data add NAME PATH` and `dataset: NAME`"
            raise field_errors([FieldError(("path",), f"{shown(path)} is not UTF-8; {remedy}")])
        return {**value, "path": path}

    @field_serializer("model")
    def _with_family(self, model: Section, info: FieldSerializationInfo) -> dict[str, Any]:
        return {"family": self.family, **model.model_dump(mode=info.mode)}

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Self:
        if _is_stored(info):
            return self
        train, workers, gate = self.train, self.scaling.num_workers, self.serve.gate
        bounds = workers if isinstance(workers, int) else (workers.min, workers.max)
        problems = cross_field_errors.batch_size(train.batch_size, train.accumulation_steps, bounds)
        if not _is_outline(info):
            family = models.declaration(self.family)
            problems += cross_field_errors.dataset_kind(self.data.dataset, family, _kinds(info))
            problems += cross_field_errors.gate_metric(gate.metric, family) if gate else []
        return _raised(self, problems)


class JobSpec(Section):
    """Describe a job: models that are trained, published and served."""

    name: Label = Field(description="name of the job; the job's id is this name and eight hex digits")
    priority: int = Field(0, ge=-1000, le=1000, description="jobs of higher priority start first")
    models: list[ModelSpec] = Field(
        min_length=1, max_length=100, description="models to train; each model is trained in its own run"
    )

    def model(self, name: str) -> ModelSpec:
        """Return the spec of one model."""
        return next(model for model in self.models if model.name == name)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        return _raised(self, cross_field_errors.repeated_names([model.name for model in self.models]))


def sections_with_key(loc: Loc, document: dict[str, Any] | None = None) -> list[str]:
    """Return the sections of a model, in words, that have a key which is unknown at `loc`.

    Args:
        document: the document; if given, the settings of the family of the model are searched too, and imported.
    """
    key, names = loc[-1], []
    sections = [*sections_of(ModelSpec)]
    if config := _family_config(loc, document):
        sections += [(("model", *path), section) for path, section in sections_of(config)]
    for path, section in sections:
        if path and key in section.model_fields:
            names.append(repr(".".join(map(str, path))))
    return names or (["an entry of 'models'"] if key in ModelSpec.model_fields else [])


def _family_config(loc: Loc, document: dict[str, Any] | None) -> type[Section] | None:
    try:
        family = document["models"][loc[1]]["model"]["family"]  # type: ignore[index]
    except (LookupError, TypeError):
        return None
    return models.declaration(family).Config if family in models.names() else None
