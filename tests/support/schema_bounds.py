"""Generate numbers at the bounds of a JSON Schema, where arithmetic breaks first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def any_value(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Generate valid values of one field: its bounds, and values between them."""
    if "anyOf" in schema:
        return st.one_of(any_value(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "null":
            return st.none()
        case "integer":
            low, high = schema["minimum"], schema.get("maximum", schema.get("exclusiveMaximum", 0) - 1)
            return st.sampled_from([low, low + 1, high]) | st.integers(low, high)
        case "number":
            return st.sampled_from(edges(schema)) | st.floats(min(edges(schema)), max(edges(schema)))
        case "object":
            values = any_value(schema["additionalProperties"])
            return st.dictionaries(st.integers(0, 9).map(str), values, max_size=3)
    raise ValueError(f"no values for {schema}")


def edges(schema: Mapping[str, Any]) -> list[float]:
    """Return the minimum and maximum valid floats, and small floats between them."""
    low = float(schema.get("minimum", -math.inf))
    if "exclusiveMinimum" in schema:
        low = math.nextafter(float(schema["exclusiveMinimum"]), math.inf)
    high = float(schema["maximum"])
    small = [value for value in (5e-324, 1e-310, 1e-300, 1e-30) if low <= value <= high]
    return [low, math.nextafter(low, math.inf), *small, high]


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    """Yield the places of a schema that have a number without a lower or an upper bound."""
    if isinstance(schema, list):
        for place, part in enumerate(schema):
            yield from unbounded(part, f"{path}[{place}]")
    if not isinstance(schema, dict):
        return
    is_number = schema.get("type") in ("integer", "number") and "enum" not in schema and "const" not in schema
    if is_number and not all(any(bound in schema for bound in bounds) for bounds in (LOWER, UPPER)):
        yield path
    for name, part in schema.items():
        if name not in ("default", "examples"):
            yield from unbounded(part, f"{path}.{name}")
