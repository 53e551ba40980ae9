"""Describe what a version answers and what memory it takes, so that no host has to load it for that.

The publisher stores the description in the version. Earlier releases did not: `read_serving` computes it from two small
files of the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from genmodels import checkpoint
from genmodels.checkpoint import File
from genmodels.data.text import load_tokenizer
from genmodels.errors import CheckpointError, DataError
from genmodels.family import Family
from genmodels.storage import Document, Storage

TOKENIZER = "assets/tokenizer.json"
MAX_BYTES = 2**24  # of `config.json` or the tokenizer


class Serving(Document):
    kind: str
    verbs: list[str]
    sizes: dict[str, int | str]  # as `GET /v1/models` shows them, by the name of the API's field
    memory: int = Field(ge=0)  # bytes on a model host


def describe_serving(family: Family[Any, Any], folder: Path) -> Serving:
    """Describe a model; only its shapes are used, so its networks need no memory.

    Args:
        folder: has the assets of the model.
    """
    return Serving(
        kind=family.kind,
        verbs=sorted(family.verbs),
        sizes=family.sizes | _example_prompt(folder / TOKENIZER),
        memory=type(family).footprint(family.config, family.data).total,
    )


def read_serving(storage: Storage, keys: Mapping[str, str], files: Mapping[str, File]) -> Serving:
    """Describe the model of a version from its `config.json` and its tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged, or this release does not know such a model.
    """
    needed = {name: file for name, file in files.items() if name in (checkpoint.CONFIG, TOKENIZER)}
    if large := next((name for name, file in needed.items() if file.size > MAX_BYTES), None):
        raise CheckpointError(f"{large}: has more than {MAX_BYTES:,} bytes")
    with checkpoint.scratch_folder() as scratch:
        folder = Path(scratch)
        checkpoint.download(storage, keys, needed, folder)
        return describe_serving(checkpoint.read_outline(folder), folder)


def _example_prompt(tokenizer: Path) -> dict[str, int | str]:
    with suppress(OSError, DataError):  # missing or damaged: hosts refuse the version, and say why
        return {"example_prompt": load_tokenizer(tokenizer.read_bytes()).example_prompt}
    return {}
