"""Read the job specs of files, e.g. of `jobs/`, as the commands do."""

from __future__ import annotations

from pathlib import Path

from genmodels.schema import yaml
from genmodels.spec.parse import parse_spec
from genmodels.spec.sections import JobSpec


def read_spec(path: Path) -> JobSpec:
    """Read the spec in a file; a relative `data.path` is relative to the folder of the file."""
    return parse_spec(yaml.read_file(path), str(path), path.absolute().parent)
