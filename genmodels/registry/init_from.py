"""Start training from existing weights: `train.init_from` names a version, or a checkpoint of any run.

Its serving weights are loaded: the averaged weights if there are some, and only the generator of a GAN. Optimizers, the
step and the schedule start anew. A text is tokenized with the tokenizer of that model.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from genmodels import checkpoint, models
from genmodels.data import CharTokenizer, Dataset, TextData, load_tokenizer
from genmodels.data.text import check_vocabulary
from genmodels.errors import CheckpointError, DataError, ModelNotFound, SpecError
from genmodels.family import DataInfo, Family, TextInfo
from genmodels.registry.references import ResolvedModel, resolve_model, resolve_reference
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage

TOKENIZER = "assets/tokenizer.json"
SMALL = (checkpoint.CONFIG, TOKENIZER)  # the files without weights


def fetch(spec: ModelSpec, storage: Storage, folder: Path, *, with_weights: bool = True) -> Path | None:
    """Download what `train.init_from` names into a new folder and verify it; None if the spec has no `init_from`.

    Args:
        with_weights: False where the weights come from another worker.

    Raises:
        SpecError: the checkpoint is deleted, damaged, or of another family; only another `init_from` helps.
    """
    if spec.train.init_from is None:
        return None
    folder.mkdir()
    reference = resolve_reference(spec.train.init_from, storage)
    try:
        source = resolve_model(storage, reference)
        files = {name: file for name, file in source.files.items() if with_weights or name in SMALL}
        checkpoint.download(storage, source.keys, files, folder)
    except (CheckpointError, ModelNotFound) as error:
        raise SpecError(f"train.init_from: {reference}: {error}") from None
    _check_family(source, spec)
    return folder


def check(
    spec: ModelSpec, storage: Storage, info: DataInfo, vocabulary: str | None, *, with_weights: bool = False
) -> DataInfo:
    """Check that `train.init_from` fits a model, without building either model.

    Args:
        info: shape of the model's data.
        vocabulary: of the text, if it is known.
        with_weights: also download and verify the weights.

    Returns:
        The info that the model is built for: a text takes the vocabulary of the model that training starts from.

    Raises:
        SpecError: the source is deleted, damaged, of another family or of another shape, or its tokenizer lacks
            characters of the text.
    """
    assert spec.train.init_from is not None
    reference = resolve_reference(spec.train.init_from, storage, pin=False)
    with checkpoint.scratch_folder() as name:
        folder = Path(name)
        try:
            source = resolve_model(storage, reference)
            files = {name: file for name, file in source.files.items() if with_weights or name in SMALL}
            checkpoint.download(storage, source.keys, files, folder)
            stored = checkpoint.read_config(folder)
            theirs = {"config": stored["config"], "data": stored["data"]}
        except (CheckpointError, KeyError, ModelNotFound, OSError, ValueError) as error:
            raise SpecError(f"train.init_from: {reference}: {error}") from None
        _check_family(source, spec)
        if info.kind == "text":
            tokenizer = _tokenizer((folder / TOKENIZER).read_bytes())
            try:
                check_vocabulary(vocabulary or "", tokenizer)
            except DataError as error:
                raise _unknown_characters(error) from None
            info = TextInfo(vocab_size=tokenizer.vocab_size)
    ours = {"config": spec.model.model_dump(mode="json"), "data": info.model_dump(mode="json")}
    if theirs != ours and _shapes(spec.family, json.dumps(theirs)) != _shapes(spec.family, json.dumps(ours)):
        raise _other_shape(theirs["config"], ours["config"], theirs["data"], ours["data"])
    return info


def _check_family(source: ResolvedModel, spec: ModelSpec) -> None:
    if source.family != spec.family:
        message = f"{source.name} is of family {source.family}, but this model is of family {spec.family}"
        raise SpecError(f"train.init_from: {message}")


@lru_cache(maxsize=256)
def _shapes(family: str, document: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a family's weights by name, from its config and data in JSON; allocates no weights."""
    import torch

    stored, cls = json.loads(document), models.load(family)
    config = cls.Config.model_validate(stored["config"], strict=False, extra="ignore")
    data: Any = TypeAdapter(DataInfo).validate_python(stored["data"], strict=False, extra="ignore")
    with torch.device("meta"):
        network = cls(config, data).network
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def adopt_tokenizer(dataset: Dataset, tokenizer: bytes | None) -> None:
    """Tokenize a text with the tokenizer of another model; does nothing for pictures.

    Args:
        tokenizer: the content of its file; None only for a model of pictures.

    Raises:
        SpecError: the text has characters that are not in the model's vocabulary.
    """
    if not isinstance(dataset, TextData):
        return
    try:
        dataset.set_tokenizer(_tokenizer(tokenizer or b""))
    except DataError as error:
        raise _unknown_characters(error) from None


def _tokenizer(content: bytes) -> CharTokenizer:
    tokenizer = load_tokenizer(content)
    assert isinstance(tokenizer, CharTokenizer)  # the only kind that exists
    return tokenizer


def _unknown_characters(error: DataError) -> SpecError:
    return SpecError(f"train.init_from: {error}; remove them from the data, or remove train.init_from")


def load(family: Family[Any, Any], folder: Path) -> None:
    """Load the serving weights in a folder into a new model.

    Raises:
        SpecError: the shapes differ.
    """
    stored = checkpoint.read_config(folder)
    data, config, ours = stored["data"], stored["config"], family.config.model_dump(mode="json")
    try:
        family.network.load_state_dict(checkpoint.load_tensors(folder / checkpoint.WEIGHTS))
    except RuntimeError:
        raise _other_shape(config, ours, data, family.data.model_dump()) from None


def _other_shape(config: dict[str, Any], ours: dict[str, Any], data: dict[str, Any], info: dict[str, Any]) -> SpecError:
    differences = "; ".join(_differences(config, ours) + _differences(data, info))
    return SpecError(f"train.init_from: its networks have another shape ({differences or 'another release'})")


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [f"{name} {theirs.get(name)}, here {value}" for name, value in ours.items() if theirs.get(name) != value]
