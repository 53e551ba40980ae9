"""Build the model of a checkpoint from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from genmodels import models
from genmodels.checkpoint.manifest import CONFIG, WEIGHTS
from genmodels.errors import CheckpointError, SpecError
from genmodels.family import DataInfo, Family
from genmodels.storage.documents import parse_object

if TYPE_CHECKING:
    from torch import Tensor


def load_family(folder: Path, weights: Mapping[str, Tensor] | None = None) -> Family[Any, Any]:
    """Load the model of a checkpoint or version: serving weights and assets, in eval mode, on the CPU.

    The shapes of the weights are checked first, so a wrong file allocates no memory for networks.

    Args:
        folder: contains `config.json`, `assets/` and, unless `weights` is given, `model.safetensors`.
        weights: the serving weights, if they are already in memory.

    Raises:
        CheckpointError: config, weights and code do not match.
    """
    import torch

    outline = read_outline(folder)
    if weights is None:
        _check_shapes(outline, _stored_shapes(folder / WEIGHTS))
        weights = load_tensors(folder / WEIGHTS)
    else:
        _check_shapes(outline, {name: tuple(tensor.shape) for name, tensor in weights.items()})
    with torch.random.fork_rng(devices=[]):  # building draws initial weights: do not advance the RNG of the caller
        family = type(outline)(outline.config, outline.data)
    family.network.load_state_dict(dict(weights))
    family.load_assets(read_assets(folder))
    family.network.eval().requires_grad_(False)
    return family


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _not_readable(path, error) from error


def read_outline(folder: Path) -> Family[Any, Any]:
    """Build the model that `config.json` describes, with networks that have shapes but no memory.

    Raises:
        CheckpointError: this release does not know such a model.
    """
    from genmodels.sizing.outline import shapes_only

    try:
        document = read_config(folder)
        cls = models.load(document["family"])
        # Lenient: a newer release may have added settings. If they matter, the shapes or the probe differ.
        config = cls.Config.model_validate(document["config"], strict=False, extra="ignore")
        data: Any = TypeAdapter(DataInfo).validate_python(document["data"], strict=False, extra="ignore")
        with shapes_only():
            return cls(config, data)
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, SpecError) as error:
        raise CheckpointError(f"{CONFIG}: {' '.join(str(error).split())[:1000]}") from error


def config_bytes(family: Family[Any, Any]) -> bytes:
    """Return the `config.json` of a model."""
    config, data = family.config.model_dump(mode="json"), family.data.model_dump(mode="json")
    document = {"family": family.family_name(), "config": config, "data": data}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a folder. Raises CheckpointError if the file is missing or damaged."""
    try:
        return parse_config((folder / CONFIG).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{CONFIG}: {error.strerror}") from None


def parse_config(data: bytes) -> dict[str, Any]:
    """Parse a `config.json` into `family`, `config` and the shape of the `data`. Raises CheckpointError if damaged."""
    try:
        document = parse_object(data)
    except ValueError as error:
        raise CheckpointError(f"{CONFIG}: damaged ({error})") from None
    for name, kind in (("family", str), ("config", dict), ("data", dict)):
        if not isinstance(document.get(name), kind):
            raise CheckpointError(f"{CONFIG}: damaged ({name} is missing or has the wrong type)")
    return document


def read_assets(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "assets").glob("*")) if path.is_file()}


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors in a file from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _not_readable(path, error) from error


def _check_shapes(outline: Family[Any, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in outline.network.state_dict().items()}
    if shapes == expected:
        return
    wrong = [name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)]
    stored, configured = (_format_shape(named.get(wrong[0])) for named in (shapes, expected))
    more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
    raise CheckpointError(f"{WEIGHTS}: {wrong[0]} is {stored}, but {CONFIG} says {configured}{more}")


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "one number"


def _not_readable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path.name}: not readable as safetensors ({error})")
