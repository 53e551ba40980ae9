"""The common parts of all requests to a model: options of the family, seeds, limits, and validation errors."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from genmodels.errors import RequestError
from genmodels.schema.base import Section
from genmodels.schema.field_errors import FieldError, field_errors, format_errors, nearest, path_of

MAX_N = 64  # choices, images, latents or steps in one request


def is_list(value: Any) -> bool:
    return isinstance(value, list)


@dataclass(frozen=True)
class ByForm:
    """Validate `One | Several` by the form of the value; a plain union would report the errors of both members.

    Args:
        several: returns True for a value that is to be validated as the second member.
    """

    several: Callable[[Any], bool] = is_list

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        one, several = (TypeAdapter(form, config=Section.model_config) for form in get_args(source))

        def validate(value: Any, _: Any) -> Any:
            return (several if self.several(value) else one).validate_python(value)

        return core_schema.no_info_wrap_validator_function(validate, handler(source))


Count = Annotated[int, Field(ge=1, le=MAX_N)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds: TypeAlias = Annotated[
    Seed | Annotated[list[Seed], Field(min_length=1, max_length=MAX_N, fail_fast=True)], ByForm()
]


class Body(Section):
    """A JSON object of a client. A null stands for the default: clients with typed fields send null."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class Request(Body):
    """A request to a model. Fields that are not declared here are options of the family."""

    model_config = ConfigDict(extra="allow")

    verb: ClassVar[str]  # that a model must support to answer it

    # Fields of OpenAI's API that have no effect here: name -> the accepted values, which request nothing; (): any.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        refused = [
            name
            for name, values in cls.neutral.items()
            if values and fields.get(name) is not None and fields[name] not in values
        ]
        if refused:
            raise field_errors(
                FieldError((name,), f"not supported here; leave it out or send {cls.neutral[name][0]!r}")
                for name in refused
            )
        return {name: value for name, value in fields.items() if name not in cls.neutral}

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the family."""
        return dict(self.model_extra or {})


def parse_options(family: type[Section], request: Request) -> Any:
    """Parse the family's options of a request.

    Raises:
        RequestError: an option is unknown or wrong.
    """
    known = {*type(request).model_fields, *family.model_fields}
    for name in request.options:
        if name not in family.model_fields:
            listed = ", ".join(sorted(family.model_fields)) or "none"
            message = f"{path_of((name,))}: unknown key{nearest(name, known) or f'; options of this model: {listed}'}"
            raise RequestError(message, param=path_of((name,)), code="unknown_parameter")
    try:
        return family.model_validate(request.options)
    except ValidationError as error:
        raise validation_error(error, family) from None


def validation_error(error: ValidationError, root: type[BaseModel]) -> RequestError:
    """Convert a failed validation into a RequestError; `param` is the first wrong field."""
    problems = format_errors(error, root)
    message = "; ".join(map(str, problems[:3])) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return RequestError(message, param=path_of(problems[0].loc) or None, code="invalid_value")


def seed_or_random(seed: int | None) -> int:
    """Return the requested seed, or a random one; the answer contains it, so that it can be repeated."""
    return secrets.randbelow(2**32) if seed is None else seed
