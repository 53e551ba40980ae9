"""Store the outputs of a model for fixed inputs, and verify that a loaded model reproduces them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genmodels import checkpoint
from genmodels.errors import CheckpointError
from genmodels.family import Family

if TYPE_CHECKING:
    import torch
    from torch import Tensor


PROBE = "probe.safetensors"
FLOAT32_TOLERANCE = 1e-4  # another machine adds in another order
# Roundings of the dtype, in units of its eps. In bfloat16 all families, of 5 to 114 layers and with weights as they are
# initialised and twice as large, differ by at most 6.8; the number does not grow with the depth.
MAX_ROUNDINGS = 10


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


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest difference from the published float32 outputs, relative to the largest of them or to 1."""
    import torch

    return max(FLOAT32_TOLERANCE, MAX_ROUNDINGS * torch.finfo(dtype).eps)


def verify_probe(family: Family[Any, Any], folder: Path) -> None:
    """Compute the outputs for the fixed inputs again, and compare them with the stored ones.

    The tolerance is that of the dtype of the weights.

    Raises:
        CheckpointError: outputs differ or are not finite: this version would not answer as the trained model did.
    """
    tolerance = tolerance_of(next(family.network.parameters()).dtype)
    expected = checkpoint.load_tensors(folder / PROBE)
    outputs = {name: tensor.cpu() for name, tensor in family.probe().items()}
    for name, tensor in expected.items():
        value = outputs.get(name)
        if value is None or value.shape != tensor.shape or not value.isfinite().all():
            raise CheckpointError(f"probe output {name!r} is missing, of another shape, or not finite")
        difference = (value - tensor).abs().max().item()
        if not difference <= tolerance * max(1.0, tensor.abs().max().item()):  # NaN compares as false
            raise CheckpointError(f"probe output {name!r} differs by {difference:.2g} from the published output")
    if missing := outputs.keys() - expected.keys():
        raise CheckpointError(f"{PROBE}: the output {min(missing)!r} is missing, so it cannot be compared")
