"""Make the JSON Schema of job specs."""

from __future__ import annotations

from typing import Any

from genmodels import models
from genmodels.spec.sections import JobSpec


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of job specs, for editors."""
    schema = JobSpec.model_json_schema()
    choices = []
    for name in models.names():
        choice = models.declaration(name).Config.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        schema["$defs"].update({f"{name}.{key}": value for key, value in choice.pop("$defs", {}).items()})
        choice["title"] = name
        choice["properties"] = {"family": {"const": name}, **choice.get("properties", {})}
        choice["required"] = ["family", *choice.get("required", [])]
        choices.append(choice)
    model = schema["$defs"]["ModelSpec"]["properties"]["model"]
    schema["$defs"]["ModelSpec"]["properties"]["model"] = {"description": model["description"], "oneOf": choices}
    schema["$defs"].pop("Section", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
