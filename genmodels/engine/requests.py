"""What all requests to a loaded version share: options of the family beside their own fields, seeds, limits."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from genmodels.errors import RequestError
from genmodels.explain import Problem, all_wrong, explain, nearest, path_of
from genmodels.family import Section

MAX_N = 64  # choices, images, latents or steps in one request

Count = Annotated[int, Field(ge=1, le=MAX_N)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Request(Section):
    """A request as a client writes it. What is not among its fields is an option of the family; null is not given."""

    model_config = ConfigDict(extra="allow")

    # Fields of an API that we imitate and do not have: name -> the value that asks for nothing, the only one taken.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        refused = [
            name for name, values in cls.neutral.items() if name in fields and values and fields[name] not in values
        ]
        if refused:
            raise all_wrong(
                Problem((name,), f"not supported here; leave it out or send {cls.neutral[name][0]!r}")
                for name in refused
            )
        return {name: value for name, value in fields.items() if name not in cls.neutral}

    @property
    def options(self) -> dict[str, Any]:
        """What the request says to the family."""
        return dict(self.model_extra or {})


def parse_options(family: type[Section], request: Request) -> Any:
    """The family's own part of a request.

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
        raise refusal(error, family) from None


def refusal(error: ValidationError, root: type[BaseModel]) -> RequestError:
    """A failed validation in words; `param` is the first field at fault."""
    problems = explain(error, root)
    message = "; ".join(map(str, problems[:3])) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return RequestError(message, param=path_of(problems[0].loc) or None, code="invalid_value")


def seed_or_random(seed: int | None) -> int:
    """The seed asked for, or one to be told to the client, so that the answer can be had again."""
    return secrets.randbelow(2**32) if seed is None else seed
