"""A version in memory, proved to be what was published."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from genmodels import checkpoint
from genmodels.data.text import Tokenizer, load_tokenizer
from genmodels.engine.image.batcher import Passes
from genmodels.engine.metrics import ImageMeter, TextMeter
from genmodels.engine.requests import Request, parse_options
from genmodels.engine.text.batcher import Batcher
from genmodels.errors import CheckpointError, DataError, ModelNotFound
from genmodels.family import Family, ImageFamily, TextFamily
from genmodels.metrics import Labels, version_labels
from genmodels.registry.references import Found
from genmodels.registry.store import finite_probe, verify_probe
from genmodels.sizing.memory import Footprint
from genmodels.storage import Storage

TOKENIZER = "tokenizer.json"
MAX_CONFIG = 2**20  # bytes


@dataclass(frozen=True)
class Loaded:
    """A model that can answer; `name` is that of its version, as in `shapes@3`."""

    name: str
    family: Family[Any, Any]

    def options(self, verb: str, request: Request) -> Any:
        """The family's own part of a request.

        Raises:
            ModelNotFound: the model does not answer this verb; the message says which it does.
            RequestError: an option is unknown or wrong.
        """
        self.check_verb(verb)
        return parse_options(self.family.Request, request)

    def check_verb(self, verb: str) -> None:
        """Raise ModelNotFound where the model does not answer this verb; the message says which it does."""
        verbs = self.family.verbs
        if verb not in verbs:
            family, answered = self.family.family_name(), ", ".join(sorted(verbs))
            raise ModelNotFound(
                f"{self.name} ({family}) has no {verb!r}; it answers: {answered}", code="verb_not_supported"
            )

    @property
    def labels(self) -> Labels:
        """Of what is counted of it."""
        return version_labels(self.name, self.family.family_name())

    def meter(self) -> None:
        """Count from now on; until then it was only tried."""

    def close(self) -> None:
        """Take no more requests; what is under way goes on to its end."""


@dataclass(frozen=True)
class ImageModel(Loaded):
    family: ImageFamily[Any, Any]

    passes: Passes = field(default_factory=Passes)  # what its requests share

    def meter(self) -> None:
        self.passes.meter = ImageMeter(self.labels)


@dataclass(frozen=True)
class TextModel(Loaded):
    family: TextFamily[Any, Any]
    tokenizer: Tokenizer

    @cached_property
    def batcher(self) -> Batcher:
        """What its texts share; made when the first comes."""
        return Batcher(self.family)

    def meter(self) -> None:
        self.batcher.meter = TextMeter(self.labels, self.batcher.slots)

    def close(self) -> None:
        self.batcher.close()


def footprint(storage: Storage, found: Found) -> Footprint:
    """Tell what a model will take in memory, of which nothing but `config.json` is read.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = found.files.get(checkpoint.CONFIG)
    if file is None or file.size > MAX_CONFIG:
        raise CheckpointError(f"{checkpoint.CONFIG}: {'missing' if file is None else 'too large for what it is'}")
    with checkpoint.scratch_folder() as scratch:
        checkpoint.download(storage, found.keys, {checkpoint.CONFIG: file}, Path(scratch))
        outline = checkpoint.read_outline(Path(scratch))
    return outline.footprint(outline.config, outline.data)


def load(storage: Storage, found: Found) -> Loaded:
    """Fetch what a name means, verify every byte, build the model, and try it.

    A version's outputs are compared with those of its publication; a checkpoint's, which nobody has judged yet, have
    to be finite.

    Raises:
        CheckpointError: a file is missing or damaged, or the outputs are not what they have to be.
    """
    with checkpoint.scratch_folder() as scratch:
        folder = Path(scratch)
        found.fetch(storage, folder)
        loaded = load_folder(folder, found.name)
        if found.version is not None:
            verify_probe(loaded.family, folder)
        else:
            finite_probe(loaded.family)
    return loaded


def load_folder(folder: Path, name: str) -> Loaded:
    """The model of a checkpoint's folder, whose files somebody else has verified.

    Raises:
        CheckpointError: config, weights, assets and code do not fit together.
    """
    family = checkpoint.load_family(folder)
    if isinstance(family, ImageFamily):
        return ImageModel(name, family)
    assert isinstance(family, TextFamily)
    content = checkpoint.read_assets(folder).get(TOKENIZER)
    if content is None:
        raise CheckpointError(f"assets/{TOKENIZER}: missing; a text model cannot answer without it")
    try:
        tokenizer = load_tokenizer(content)
    except DataError as error:
        raise CheckpointError(f"assets/{error}") from error
    found, expected = tokenizer.vocab_size, family.data.vocab_size
    if found != expected:
        raise CheckpointError(f"assets/{TOKENIZER}: has {found} tokens, the model has {expected}")
    return TextModel(name, family, tokenizer)
