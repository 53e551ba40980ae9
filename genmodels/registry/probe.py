"""Store the outputs of a model for fixed inputs, and verify that a loaded model reproduces them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genmodels import checkpoint
from genmodels.errors import CheckpointError
from genmodels.family import Family

if TYPE_CHECKING:
    from torch import Tensor


PROBE = "probe.safetensors"


def finite_probe(family: Family[Any, Any]) -> dict[str, Tensor]:
    """Return the outputs for the fixed inputs.

    Raises:
        CheckpointError: an output is not finite, so no host would serve this model.
    """
    outputs = {name: tensor.contiguous() for name, tensor in family.probe().items()}
    spoiled = [name for name, tensor in outputs.items() if not tensor.isfinite().all()]
    if spoiled:
        raise CheckpointError(f"probe output {spoiled[0]!r} is not finite: the weights are spoiled")
    return outputs


def write_probe(family: Family[Any, Any], folder: Path) -> None:
    """Store the outputs for the fixed inputs.

    Raises:
        CheckpointError: an output is not finite.
    """
    from safetensors.torch import save_file

    save_file(finite_probe(family), folder / PROBE)


def verify_probe(family: Family[Any, Any], folder: Path, tolerance: float = 1e-4) -> None:
    """Compute the outputs for the fixed inputs again and compare them with the stored ones.

    Args:
        tolerance: largest absolute difference; float32 on another machine differs by rounding.

    Raises:
        CheckpointError: outputs differ or are not finite: this version would not answer as the trained model did.
    """
    import torch

    expected = checkpoint.load_tensors(folder / PROBE)
    outputs = family.probe()
    for name, tensor in expected.items():
        value = outputs.get(name)
        if value is None or value.shape != tensor.shape or not torch.isfinite(value).all():
            raise CheckpointError(f"probe output {name!r} is missing, of another shape, or not finite")
        difference = (value.cpu() - tensor).abs().max().item()
        if not difference <= tolerance * max(1.0, tensor.abs().max().item()):  # NaN compares as false
            raise CheckpointError(f"probe output {name!r} differs by {difference:.2g} from the published output")
    if missing := outputs.keys() - expected.keys():
        raise CheckpointError(f"{PROBE}: the output {min(missing)!r} is missing, so it cannot be compared")
