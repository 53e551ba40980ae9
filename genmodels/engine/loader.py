"""Load a version into memory and check that it is what was published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from genmodels import checkpoint
from genmodels.data.text import load_tokenizer
from genmodels.engine.image.batcher import DynamicBatcher
from genmodels.engine.image.model import ImageModel
from genmodels.engine.model import LoadedModel
from genmodels.engine.text.model import TextModel
from genmodels.errors import CheckpointError, DataError
from genmodels.family import Family, ImageFamily, TextFamily
from genmodels.registry.probe import finite_probe, verify_probe
from genmodels.registry.references import ResolvedModel
from genmodels.sizing.memory import Footprint
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement
from genmodels.storage import Storage

TOKENIZER = "tokenizer.json"
MAX_CONFIG = 2**20  # bytes


def footprint(storage: Storage, resolved: ResolvedModel, placement: Placement) -> Footprint:
    """Compute the memory that a model will take on its device; reads only its `config.json`.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    file = resolved.files.get(checkpoint.CONFIG)
    if file is None or file.size > MAX_CONFIG:
        raise CheckpointError(
            f"{checkpoint.CONFIG}: {'missing' if file is None else f'larger than {MAX_CONFIG} bytes'}"
        )
    with checkpoint.scratch_folder() as scratch:
        checkpoint.download(storage, resolved.keys, {checkpoint.CONFIG: file}, Path(scratch))
        outline = checkpoint.read_outline(Path(scratch))
    return outline.footprint(outline.config, outline.data, _placement_of(outline, placement))


def load(storage: Storage, resolved: ResolvedModel, placement: Placement = DEFAULT_PLACEMENT) -> LoadedModel:
    """Download a model, verify every byte, build it on its device, and check its outputs there.

    The outputs of a version must be those of its publication. A checkpoint has no published outputs: its outputs must
    be finite.

    Raises:
        CheckpointError: a file is missing or damaged, or the outputs are wrong.
    """
    with checkpoint.scratch_folder() as scratch:
        folder = Path(scratch)
        resolved.fetch(storage, folder)
        model = load_folder(folder, resolved.name, placement)
        if resolved.version is not None:
            verify_probe(model.family, folder)
        else:
            finite_probe(model.family)
    return model


def load_folder(folder: Path, name: str, placement: Placement = DEFAULT_PLACEMENT) -> LoadedModel:
    """Build the model of a checkpoint's folder on its device. The caller has verified the files.

    Raises:
        CheckpointError: config, weights, assets and code do not fit together.
    """
    family = checkpoint.load_family(folder)
    family.to(placement.torch_device, placement.torch_dtype)
    family.network.eval()
    return _BUILDERS[family.kind](name, family, folder, placement)


def _image_model(name: str, family: Family[Any, Any], _: Path, placement: Placement) -> ImageModel:
    assert isinstance(family, ImageFamily)
    return ImageModel(name, family, DynamicBatcher(placement))


def _text_model(name: str, family: Family[Any, Any], folder: Path, placement: Placement) -> TextModel:
    assert isinstance(family, TextFamily)
    content = checkpoint.read_assets(folder).get(TOKENIZER)
    if content is None:
        raise CheckpointError(f"assets/{TOKENIZER}: missing; a text model cannot answer without it")
    try:
        tokenizer = load_tokenizer(content)
    except DataError as error:
        raise CheckpointError(f"assets/{error}") from error
    size, expected = tokenizer.vocab_size, family.data.vocab_size
    if size != expected:
        raise CheckpointError(f"assets/{TOKENIZER}: has {size} tokens, the model has {expected}")
    return TextModel(name, family, tokenizer, _placement_of(family, placement).rows)


def _placement_of(family: Family[Any, Any], placement: Placement) -> Placement:
    if family.kind != TextFamily.kind:
        return placement
    return placement.for_texts(lambda larger: family.footprint(family.config, family.data, larger).total)


_BUILDERS: dict[str, Callable[[str, Family[Any, Any], Path, Placement], LoadedModel]] = {
    ImageFamily.kind: _image_model,
    TextFamily.kind: _text_model,
}
