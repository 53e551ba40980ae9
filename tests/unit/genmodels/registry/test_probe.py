"""Test the verification of a model's outputs in other dtypes: rounding is accepted, wrong weights are not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from genmodels.errors import CheckpointError
from genmodels.registry.probe import tolerance_of, verify_probe, write_probe
from tests.support.published_models import CONFIGS, build

CPU = torch.device("cpu")


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return a model whose published outputs are in `tmp_path`."""
    family, _ = build(request.param)
    generator = torch.Generator().manual_seed(0)
    for weight in family.network.parameters():
        weight.requires_grad_(False).mul_(2)  # outputs as different as a trained model's
        if not weight.any():
            weight.normal_(0, 0.1, generator=generator)
    write_probe(family, tmp_path)
    return family


def test_the_tolerance_is_that_of_the_dtype() -> None:
    assert tolerance_of(torch.float32) == 1e-4
    assert tolerance_of(torch.float16) == 10 * 2**-10
    assert tolerance_of(torch.bfloat16) == 10 * 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_accepted_and_wrong_weights_are_not(family: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    family.to(CPU, dtype)
    verify_probe(family, tmp_path)
    matrices = [name for name, weight in family.network.named_parameters() if weight.dim() > 1]
    refused = 0
    for name in matrices:
        wrong = copy.deepcopy(family)
        weight = dict(wrong.network.named_parameters())[name]
        weight.copy_(weight.flip(0))
        try:
            verify_probe(wrong, tmp_path)
        except CheckpointError:
            refused += 1
    # In float32 each is seen. In 8 bits a matrix of the last level of a GAN makes a difference as small as rounding.
    assert refused >= (len(matrices) if dtype == torch.float32 else len(matrices) / 2)


def test_weights_that_overflow_are_refused(family: Any, tmp_path: Path) -> None:
    for weight in family.network.parameters():
        weight.mul_(1e30)
    family.to(CPU, torch.float16)
    with pytest.raises(CheckpointError, match=r"not finite|differs by"):
        verify_probe(family, tmp_path)
