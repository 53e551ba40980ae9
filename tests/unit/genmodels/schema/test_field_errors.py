"""Test error messages: the value that a message advises is accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, Field, ValidationError

from genmodels import models
from genmodels.engine.image.requests import VERB_REQUESTS, DecodeRequest
from genmodels.family import OptimizerConfig
from genmodels.nn.sampling import SamplingOptions
from genmodels.schema.base import Section
from genmodels.schema.field_errors import format_errors
from genmodels.spec.sections import CheckpointConfig, JobSpec, ScalingConfig, TrainConfig
from services.gateway.completions import CompletionBody
from services.gateway.routes import GenerationBody
from services.jobs.schemas import AliasBody, CancelBody, DatasetQuery, ListQuery, MetricsQuery

REQUESTS: list[type[BaseModel]] = [
    CompletionBody,
    GenerationBody,
    *VERB_REQUESTS,
    AliasBody,
    CancelBody,
    DatasetQuery,
    ListQuery,
    MetricsQuery,
]
FAMILIES: list[type[BaseModel]] = [
    kind for name in models.names() for kind in (models.load(name).Request, models.load(name).Config)
]
SPECS: list[type[BaseModel]] = [JobSpec, TrainConfig, ScalingConfig, CheckpointConfig, OptimizerConfig]
REQUIRED = {
    "model": "m",
    "prompt": "x",
    "images": [[[0.5]]],
    "latents": [[0.5]],
    "start": 1,
    "end": 2,
    "version": 1,
    "name": "job",
    "models": [{"name": "a", "model": {"family": "vae"}, "data": {"dataset": "digits"}}],
    "max_steps": 1000,
}
RELATED = ("n_embd", "warmup_steps")  # of these 6.0 is answered with `write 6`, which other fields may not allow
JUNK = (True, "x", "3", 2.5, 6.0, 1e6, 1e300, -1, -1.0, 10**30, None, [], {}, [[]])


def numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(numeric, get_args(annotation)))


def fields() -> Iterator[Any]:
    for root in dict.fromkeys([*REQUESTS, *FAMILIES, *SPECS]):
        for name, field in root.model_fields.items():
            if numeric(field.annotation) or field.annotation is bool:
                yield pytest.param(root, name, id=f"{root.__module__.rpartition('.')[2]}.{root.__name__}.{name}")


def refusals(root: type[BaseModel], name: str, value: Any) -> list[str]:
    needed = {key: REQUIRED[key] for key, field in root.model_fields.items() if field.is_required() and key in REQUIRED}
    try:
        root.model_validate({**needed, name: value})
    except ValidationError as error:
        return [problem.text for problem in format_errors(error, root) if problem.loc == (name,)]
    return []


@pytest.mark.parametrize(("root", "name"), list(fields()))
def test_the_value_that_an_error_advises_is_taken(root: type[BaseModel], name: str) -> None:
    advised, form = 0, "; write e.g. " if name in RELATED else "; write (?:e[.]g[.] )?"
    for junk in JUNK:
        for text in refusals(root, name, junk):
            if result := re.search(form + r"(\S+)$", text):
                advised += 1
                assert refusals(root, name, json.loads(result[1])) == [], text
    if root.model_fields[name].annotation in (int, float, bool):
        assert advised


class Odd(Section):
    tiny: int = Field(ge=3, le=7)
    even: int | None = Field(None, multiple_of=6, gt=0)
    small: Annotated[float, Field(gt=0.2, lt=0.9)] | None = None
    below: float = Field(lt=0)
    numbers: list[Annotated[int, Field(le=5)]] = Field([])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tiny", "x", "got 'x', expected a whole number"),
        ("tiny", 9.0, "got 9.0, expected a whole number"),
        ("tiny", 5.0, "got 5.0, expected a whole number; write 5"),
        ("even", True, "got true, expected a whole number"),
        ("even", 6.0, "got 6.0, expected a whole number; write 6"),
        ("even", 7, "got 7, expected a whole number a multiple of 6"),
        ("small", "x", "got 'x', expected a number"),
        ("below", "x", "got 'x', expected a number"),
        ("below", 1.0, "got 1.0, expected a number less than 0.0"),
    ],
)
def test_where_no_example_fits_none_is_given(name: str, value: Any, text: str) -> None:
    (result,) = refusals(Odd, name, value)
    assert result == text


def test_an_entry_of_a_list_is_a_number_of_its_own() -> None:
    with pytest.raises(ValidationError) as caught:
        Odd.model_validate({"tiny": 3, "below": -1.0, "numbers": [1, 6, "x"]})
    assert list(map(str, format_errors(caught.value, Odd))) == [
        "numbers[1]: got 6, expected a whole number at most 5",
        "numbers[2]: got 'x', expected a whole number",
    ]


MANY = 50_000


@pytest.mark.parametrize(
    ("root", "name", "value"),
    [
        (CompletionBody, "prompt", [1] + ["x"] * MANY),
        (CompletionBody, "prompt", [["x"] * MANY] * 60),
        (CompletionBody, "prompt", ["x"] + [1] * 60),
        (CompletionBody, "seed", [-1] * 60),
        (GenerationBody, "seed", ["x"] * 60),
        (DecodeRequest, "latents", [["x"] * MANY] * 60),
        (DecodeRequest, "latents", [0] * MANY),
        (SamplingOptions, "logit_bias", dict.fromkeys(map(str, range(MANY)), "x")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:20]),
)
def test_of_a_list_of_wrong_entries_the_first_is_told_and_no_other_judged(
    root: type[BaseModel], name: str, value: Any
) -> None:
    """One error for each entry took 12 s and 2 GB in the gateway for one body of 8 MiB."""
    needed = {key: REQUIRED[key] for key, field in root.model_fields.items() if field.is_required()}
    with pytest.raises(ValidationError) as caught:
        root.model_validate({**needed, name: value})
    assert caught.value.error_count() == 1
