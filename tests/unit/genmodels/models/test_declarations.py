"""Test what specs are checked against without torch: it is what the family itself has."""

from __future__ import annotations

import pkgutil
import random
from typing import Any

import pytest
from pydantic import ValidationError

from genmodels import declarations, models
from genmodels.errors import SpecError
from genmodels.family import Declaration
from genmodels.sizing.memory import HOST_MEMORY

DECLARED = [name for name in models.names() if models.declaration(name) is not models.load(name)]


def test_each_file_declares_a_family() -> None:
    files = {module.name for module in pkgutil.iter_modules(declarations.__path__)}
    assert set(DECLARED) == files - {"image_networks"}


@pytest.mark.parametrize("name", DECLARED)
def test_a_family_is_what_its_declaration_says(name: str) -> None:
    declared, family = models.declaration(name), models.load(name)
    assert issubclass(family, declared)
    assert declared.family_name() == family.family_name() == name
    inherited = ("Config", "kind", "metric_names", "evaluation_names", "known_to_fit")
    assert [getattr(declared, one) for one in inherited] == [getattr(family, one) for one in inherited]
    assert declared.check.__func__ is family.check.__func__  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DECLARED)
def test_what_surely_fits_does_fit(name: str) -> None:
    """The model that is known to fit takes at most half of a host's memory; none of 30 smaller ones takes more."""
    family, chance = models.load(name), random.Random(name)
    assert family.known_to_fit is not None
    config, data = family.known_to_fit
    most = family.footprint(config, data).total
    assert most <= HOST_MEMORY / 2
    measured = 0
    while measured < 30:
        try:
            smaller, info = _smaller(config, chance), _smaller(data, chance)
            family.check(smaller, info)
        except (ValidationError, SpecError):  # e.g. a latent larger than the image
            continue
        assert family.surely_fits(smaller, info)
        assert family.footprint(smaller, info).total <= most * 1.2  # choices of fewer heads need slightly more
        measured += 1


@pytest.mark.parametrize("name", DECLARED)
def test_one_number_more_is_not_sure_to_fit(name: str) -> None:
    declared: type[Declaration] = models.declaration(name)
    assert declared.known_to_fit is not None
    config, data = declared.known_to_fit
    assert declared.surely_fits(config, data)
    for section in (config, data):
        for field, value in dict(section).items():
            if type(value) is int:
                larger = section.model_copy(update={field: value + 1})
                pair: Any = (larger, data) if section is config else (config, larger)
                assert not declared.surely_fits(*pair)


def _smaller(section: Any, chance: random.Random) -> Any:
    """Return the section with smaller integers, and with other choices, on and off, as they come."""
    changed: dict[str, Any] = {}
    schema = type(section).model_json_schema()["properties"]
    for field, value in dict(section).items():
        if type(value) is int:
            changed[field] = chance.randint(schema[field].get("minimum", 1), value)
        elif choices := schema[field].get("enum"):
            changed[field] = chance.choice(choices)
        elif isinstance(value, bool):
            changed[field] = chance.random() < 0.5
    return type(section).model_validate(dict(section) | changed)
