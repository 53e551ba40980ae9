"""Weights that training begins with: `train.init_from` names a version, or a checkpoint of any run.

What is served of it is taken: the averaged weights where there are some, and of a GAN the generator. Optimizers, the
step and the schedule begin anew. A text is read with the tokenizer of the model that is continued.
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
from genmodels.registry.pin import resolve
from genmodels.registry.references import find
from genmodels.spec.sections import ModelSpec
from genmodels.storage import Storage


def fetch(spec: ModelSpec, storage: Storage, folder: Path) -> Path | None:
    """Download what `train.init_from` names into a new folder, verified; None where a model starts from nothing.

    Raises:
        SpecError: it is gone, damaged, or of another family; nothing but another `init_from` helps.
    """
    if spec.train.init_from is None:
        return None
    folder.mkdir()
    pinned = resolve(spec.train.init_from, storage)
    try:
        find(storage, pinned).fetch(storage, folder)
    except (CheckpointError, ModelNotFound) as error:
        raise SpecError(f"train.init_from: {pinned}: {error}") from None
    family = checkpoint.read_config(folder)["family"]
    if family != spec.family:
        raise SpecError(f"train.init_from: {pinned} is of family {family}, this model of {spec.family}")
    return folder


def check(
    spec: ModelSpec, storage: Storage, info: DataInfo, vocabulary: str | None, *, with_weights: bool = False
) -> DataInfo:
    """See that `train.init_from` fits a model, without building either.

    Args:
        info: of the model's data.
        vocabulary: of the text, where it is known.
        with_weights: see also that the weights are there and whole.

    Returns:
        The info that the model is built for: a text takes the vocabulary of what is continued.

    Raises:
        SpecError: it is gone, damaged, of another family or of another shape, or the text has characters that it does
            not know.
    """
    assert spec.train.init_from is not None
    pinned = resolve(spec.train.init_from, storage, mark=False)
    with checkpoint.scratch_folder() as name:
        folder = Path(name)
        try:
            found = find(storage, pinned)
            small = {checkpoint.CONFIG, "assets/tokenizer.json"}
            files = {name: file for name, file in found.files.items() if with_weights or name in small}
            checkpoint.download(storage, found.keys, files, folder)
            theirs = checkpoint.read_config(folder)
            before = {"config": theirs["config"], "data": theirs["data"]}
        except (CheckpointError, KeyError, ModelNotFound, OSError, ValueError) as error:
            raise SpecError(f"train.init_from: {pinned}: {error}") from None
        if found.family != spec.family:
            raise SpecError(f"train.init_from: {pinned} is of family {found.family}, this model of {spec.family}")
        if info.kind == "text":
            tokenizer = _tokenizer(folder)
            try:
                check_vocabulary(vocabulary or "", tokenizer)
            except DataError as error:
                raise _foreign_text(error) from None
            info = TextInfo(vocab_size=tokenizer.vocab_size)
    ours = {"config": spec.model.model_dump(mode="json"), "data": info.model_dump(mode="json")}
    if before != ours and _shapes(spec.family, json.dumps(before)) != _shapes(spec.family, json.dumps(ours)):
        raise _other_shape(before["config"], ours["config"], before["data"], ours["data"])
    return info


@lru_cache(maxsize=256)
def _shapes(family: str, document: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a family's weights by name, from its config and data in JSON; takes no memory for weights."""
    import torch

    found, cls = json.loads(document), models.load(family)
    config = cls.Config.model_validate(found["config"], strict=False, extra="ignore")
    data: Any = TypeAdapter(DataInfo).validate_python(found["data"], strict=False, extra="ignore")
    with torch.device("meta"):
        network = cls(config, data).network
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def adopt_tokenizer(dataset: Dataset, folder: Path) -> None:
    """Have a text speak the token ids of the model in a folder; pictures have none.

    Raises:
        SpecError: the text has characters that the model has never seen.
    """
    if not isinstance(dataset, TextData):
        return
    try:
        dataset.set_tokenizer(_tokenizer(folder))
    except DataError as error:
        raise _foreign_text(error) from None


def _tokenizer(folder: Path) -> CharTokenizer:
    tokenizer = load_tokenizer(checkpoint.read_assets(folder)["tokenizer.json"])
    assert isinstance(tokenizer, CharTokenizer)  # the only kind there is
    return tokenizer


def _foreign_text(error: DataError) -> SpecError:
    return SpecError(f"train.init_from: {error}; remove them from the data, or start from nothing")


def load(family: Family[Any, Any], folder: Path) -> None:
    """Put the served weights in a folder into a freshly built model.

    Raises:
        SpecError: the shapes differ.
    """
    found = checkpoint.read_config(folder)
    data, config, ours = found["data"], found["config"], family.config.model_dump(mode="json")
    try:
        family.network.load_state_dict(checkpoint.load_tensors(folder / checkpoint.WEIGHTS))
    except RuntimeError:
        raise _other_shape(config, ours, data, family.data.model_dump()) from None


def _other_shape(config: dict[str, Any], ours: dict[str, Any], data: dict[str, Any], info: dict[str, Any]) -> SpecError:
    said = "; ".join(_differences(config, ours) + _differences(data, info))
    return SpecError(f"train.init_from: its networks have another shape ({said or 'another release'})")


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [f"{name} {theirs.get(name)}, here {value}" for name, value in ours.items() if theirs.get(name) != value]
