"""Weights that training begins with: `train.init_from` names a version, or a checkpoint of any run.

What is served of it is taken: the averaged weights where there are some, and of a GAN the generator. Optimizers, the
step and the schedule begin anew. A text is read with the tokenizer of the model that is continued.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genmodels import checkpoint
from genmodels.data import CharTokenizer, Dataset, TextData, load_tokenizer
from genmodels.errors import CheckpointError, DataError, ModelNotFound, SpecError
from genmodels.family import Family
from genmodels.pin import resolve
from genmodels.references import find
from genmodels.spec import ModelSpec
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


def adopt_tokenizer(dataset: Dataset, folder: Path) -> None:
    """Have a text speak the token ids of the model in a folder; pictures have none.

    Raises:
        SpecError: the text has characters that the model has never seen.
    """
    if not isinstance(dataset, TextData):
        return
    tokenizer = load_tokenizer(checkpoint.read_assets(folder)["tokenizer.json"])
    assert isinstance(tokenizer, CharTokenizer)  # the only kind there is
    try:
        dataset.speak(tokenizer)
    except DataError as error:
        raise SpecError(f"train.init_from: {error}; remove them from the data, or start from nothing") from None


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
        said = "; ".join(_differences(config, ours) + _differences(data, family.data.model_dump()))
        raise SpecError(f"train.init_from: its networks have another shape ({said or 'another release'})") from None


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [f"{name} {theirs.get(name)}, here {value}" for name, value in ours.items() if theirs.get(name) != value]
