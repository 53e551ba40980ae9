"""A version in memory, proved to be what was published."""

from __future__ import annotations

from pathlib import Path

from genmodels import checkpoint
from genmodels.data.text import load_tokenizer
from genmodels.engine.image.model import ImageModel
from genmodels.engine.model import Loaded
from genmodels.engine.text.model import TextModel
from genmodels.errors import CheckpointError, DataError
from genmodels.family import ImageFamily, TextFamily
from genmodels.registry.probe import finite_probe, verify_probe
from genmodels.registry.references import ResolvedModel
from genmodels.sizing.memory import Footprint
from genmodels.storage import Storage

TOKENIZER = "tokenizer.json"
MAX_CONFIG = 2**20  # bytes


def footprint(storage: Storage, found: ResolvedModel) -> Footprint:
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


def load(storage: Storage, found: ResolvedModel) -> Loaded:
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
