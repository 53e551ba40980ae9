"""Test that every number of a request has a minimum and a maximum, and that an error names the field outside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from genmodels import models
from genmodels.engine.requests import Request, parse_options
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.family import ImageInfo, TextInfo
from genmodels.nn.sampling import SamplingOptions
from genmodels.schema.base import Section
from services.gateway import completions
from services.gateway import routes as gateway_routes
from services.http.query import Strict
from services.jobs import schemas
from tests.support.schema_bounds import unbounded

MODULES = (gateway_routes, completions, schemas)  # the modules of all request bodies and queries


def kinds_of(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds_of(kind)


BODIES = [kind for kind in kinds_of(Section) if kind.__module__ in {module.__name__ for module in MODULES}]
REQUESTS: list[type[BaseModel]] = [
    *(kind for kind in kinds_of(Request)),
    *BODIES,
    *(kind for kind in kinds_of(Strict) if kind.__module__.startswith("services")),
    *(models.load(name).Request for name in models.names()),
    ImageInfo,
    TextInfo,
]


@pytest.mark.parametrize("kind", dict.fromkeys(REQUESTS), ids=lambda kind: kind.__name__)
def test_every_number_of_a_request_has_a_lower_and_an_upper_bound(kind: type[BaseModel]) -> None:
    assert list(unbounded(kind.model_json_schema())) == []


def test_the_requests_are_found_and_a_missing_bound_is_seen() -> None:
    names = {kind.__name__ for kind in REQUESTS}
    assert names >= {"CompletionBody", "GenerationBody", "InterpolateRequest", "SamplingOptions", "MetricsQuery"}
    assert names >= {"AliasBody", "StreamOptions", "GANRequest", "VAERequest", "DecodeRequest"}

    class Loose(CompletionRequest):
        free: list[dict[str, float | None]]

    assert list(unbounded(Loose.model_json_schema())) == [
        ".properties.free.items.additionalProperties.anyOf[0]",
    ]


OUTSIDE: list[tuple[str, Any]] = [
    ("repetition_penalty", 1e-310),
    ("repetition_penalty", 0),
    ("repetition_penalty", 10.5),
    ("top_k", 2**31),
    ("top_k", 9_223_372_036_854_775_808),
    ("top_k", 10**300),
    ("temperature", -5e-324),
    ("temperature", 1e308),
    ("top_p", 0),
    ("top_p", -1e-310),
    ("min_p", 1.5),
    ("presence_penalty", 1e300),
    ("frequency_penalty", -1e300),
    ("logit_bias", {"3": 1e300}),
    ("max_tokens", 2**64),
]


@pytest.mark.parametrize(("name", "value"), OUTSIDE)
def test_an_option_out_of_bounds_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=r"got .*, expected a.* (at least|at most|greater than) ") as error:
        parse_options(SamplingOptions, CompletionRequest.model_validate({"prompt": "x", name: value}))
    assert error.value.status == 400
    assert error.value.param is not None
    assert error.value.param.startswith(name)
