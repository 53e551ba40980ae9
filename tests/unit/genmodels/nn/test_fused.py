"""The hand-written backward passes against autograd's over the elementary operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genmodels.models.minigpt import rotations
from genmodels.nn.fused import rms_norm, rotate, swiglu

ROTATION = rotations(torch.arange(7) + 3, 8)[:, None]


def plain_rotate(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * ROTATION).flatten(-2)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rms_norm": (rms_norm, lambda x: F.rms_norm(x, (8,))),
    "rotate": (lambda x: rotate(x, ROTATION, normalise=False), plain_rotate),
    "normalise and rotate": (
        lambda x: rotate(x, ROTATION, normalise=True),
        lambda x: plain_rotate(F.rms_norm(x, (8,))),
    ),
    "swiglu": (swiglu, plain_swiglu),
}


@pytest.mark.parametrize("view", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, view: bool) -> None:
    """A part of a larger tensor has rows with gaps, as queries and keys have next to values."""
    fused, plain = CASES[name]
    whole = torch.randn(2, 7, 5, 8, generator=torch.Generator().manual_seed(0)).mul_(3)
    results = []
    for compute in (fused, plain):
        leaf = whole.clone().requires_grad_()
        result = compute(leaf[:, :, :2] if view else leaf)
        weights = torch.linspace(-1, 2, result.numel()).view_as(result)
        (gradient,) = torch.autograd.grad((result * weights).sum(), leaf)
        results.append((result.detach(), gradient))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_compiler_gets_operations_with_the_same_result(name: str) -> None:
    fused, _ = CASES[name]
    x = torch.randn(2, 7, 2, 8, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), fused(x), rtol=2e-5, atol=2e-6)


def test_bfloat16_stays_bfloat16_and_is_near() -> None:
    x = torch.randn(2, 7, 2, 8, generator=torch.Generator().manual_seed(2))
    for fused, _ in CASES.values():
        rounded = x.bfloat16().requires_grad_()
        result = fused(rounded)
        result.sum().backward()
        assert result.dtype == torch.bfloat16
        assert rounded.grad is not None
        assert rounded.grad.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), fused(x), rtol=0.05, atol=0.05)


def test_rotary_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 16)
    far = rotations(torch.arange(2000), 16)

    def score(at: int, of: int) -> float:
        turned = (rotate(x, far[place], normalise=False) for x, place in ((query, at), (key, of)))
        return float(torch.dot(*turned))

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert score(3, 3) == pytest.approx(float(query @ key), abs=1e-4)
    assert abs(score(7, 3) - score(3, 7)) > 1e-2  # the direction counts
