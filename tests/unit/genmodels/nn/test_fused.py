"""The hand-written backward passes against autograd's over the elementary operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genmodels.models.minigpt import rotations
from genmodels.nn.fused import rms_norm, split_heads, swiglu

ROTATION = rotations(torch.arange(7) + 3, 8)[:, None, None].expand(-1, 2, 5, -1).contiguous()


def plain_heads(x: Tensor, *, rotate: bool, normalise: bool) -> Tensor:
    turned, value = x[:, :, :2], x[:, :, 2]
    if normalise:
        turned = F.rms_norm(turned, (8,))
    if rotate:
        pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * ROTATION).flatten(-2)
    return torch.stack((*turned.unbind(2), value * 3))


def fused_heads(x: Tensor, *, rotate: bool, normalise: bool) -> Tensor:
    query, key, value = split_heads(x, ROTATION if rotate else None, normalise=normalise)
    return torch.stack((query, key, value * 3))


def heads(**settings: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return partial(fused_heads, **settings), partial(plain_heads, **settings)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rms_norm": (rms_norm, lambda x: F.rms_norm(x, (8,))),
    "turned heads": heads(rotate=True, normalise=False),
    "normalised heads": heads(rotate=False, normalise=True),
    "normalised and turned heads": heads(rotate=True, normalise=True),
    "heads as they are": heads(rotate=False, normalise=False),
    "swiglu": (swiglu, plain_swiglu),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    fused, plain = CASES[name]
    x = torch.randn(2, 7, 3, 5, 8, generator=torch.Generator().manual_seed(0)).mul_(3)
    results = []
    for compute in (fused, plain):
        leaf = x.clone().requires_grad_()
        result = compute(leaf)
        weights = torch.linspace(-1, 2, result.numel()).view_as(result)
        (gradient,) = torch.autograd.grad((result * weights).sum(), leaf)
        results.append((result.detach(), gradient))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_compiler_gets_operations_with_the_same_result(name: str) -> None:
    fused, _ = CASES[name]
    x = torch.randn(2, 7, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), fused(x), rtol=2e-5, atol=2e-6)


def test_bfloat16_stays_bfloat16_and_is_near() -> None:
    x = torch.randn(2, 7, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    for fused, _ in CASES.values():
        rounded = x.bfloat16().requires_grad_()
        result = fused(rounded)
        result.sum().backward()
        assert result.dtype == torch.bfloat16
        assert rounded.grad is not None
        assert rounded.grad.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), fused(x), rtol=0.05, atol=0.05)


def test_rotary_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(at: int, of: int) -> float:
        turned = (
            split_heads(x.expand(1, 1, 3, 1, 16), rotations(torch.tensor([place]), 16)[:, None, None], normalise=False)
            for x, place in ((query, at), (key, of))
        )
        return float(torch.dot(*(first.flatten() for first, _, _ in turned)))

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-3)
    assert score(3, 3) == pytest.approx(float(query @ key.mT), abs=1e-4)
    assert abs(score(7, 3) - score(3, 7)) > 1e-2  # the direction counts
