"""Define the names in job specs: labels, aliases, and references to versions and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
)

from genmodels.data import uploads
from genmodels.schema.field_errors import as_label, field_error, show

LABEL = uploads.NAME  # one rule for every name that a user chooses


# `model`, `model@3`, `model@alias`, `model@latest`, `model@live`, `model@step-500`, `model@<job id>:step-500`
REFERENCE = r"^[a-z0-9-]{1,63}(@[a-z0-9-]{1,63}|@[a-z0-9-]{1,72}:step-[0-9]{1,9})?$"
# The references that name a checkpoint of a run; the others name a version.
CHECKPOINT_REFERENCE = r"[a-z0-9-]{1,63}@([a-z0-9-]{1,72}:)?(live|step-[0-9]{1,9})"


def _label(name: str) -> str:
    if re.fullmatch(LABEL, name):
        return name
    near = as_label(name)
    rule = "expected at most 63 lower-case letters, digits and '-', with no '-' at the ends"
    raise field_error(f"got {show(name)}, {rule}" + (f"; write e.g. {near}" if near else ""))


def _alias(name: str) -> str:
    if name.isdigit() or name in ("latest", "live") or name.startswith("step-"):
        raise field_error(
            f"got {show(name)}, which is reserved for versions and steps; write another name, e.g. production"
        )
    return name


def _reference(name: str) -> str:
    names = re.split("[@:]", name)
    if re.fullmatch(REFERENCE, name) and all(part.strip("-") == part for part in names):
        return name
    forms = "model@3, model@production, model@latest, model@step-500 or model@<job id>:step-500"
    raise field_error(f"got {show(name)}, expected a version or a checkpoint: {forms}")


Label = Annotated[str, AfterValidator(_label), Field(json_schema_extra={"pattern": LABEL})]


Alias = Annotated[Label, AfterValidator(_alias)]


Reference = Annotated[str, AfterValidator(_reference), Field(json_schema_extra={"pattern": REFERENCE})]
