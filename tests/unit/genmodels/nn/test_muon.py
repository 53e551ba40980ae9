"""Our Muon against torch's, which takes one matrix at a time in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genmodels.nn import muon
from genmodels.nn.muon import Muon, orthogonalise

SHAPES = [(8, 8), (8, 8), (20, 8), (8, 20), (8, 20), (1, 6)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.fixture(params=[{"avx512_bf16": True}, {"amx_bf16": True}, {}], ids=lambda flags: next(iter(flags), "float32"))
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Let the processor have instructions for bfloat16 or not; yield the dtype that is fast there."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: request.param)
    muon._fast_dtype.cache_clear()
    yield torch.bfloat16 if request.param else torch.float32
    muon._fast_dtype.cache_clear()


def trained(cls: type[torch.optim.Muon], steps: int = 5) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    numbers = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=numbers)) for shape in SHAPES]
    optimizer = cls(matrices, lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        for matrix in matrices[:-1]:  # the last one has no gradient
            matrix.grad = torch.randn(matrix.shape, generator=numbers)
        optimizer.step()
    return [matrix.detach() for matrix in matrices], optimizer


def test_it_takes_torchs_steps_and_keeps_torchs_state(processor: torch.dtype) -> None:
    (ours, mine), (theirs, other) = trained(Muon), trained(torch.optim.Muon)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0.01, atol=0.005)  # bfloat16 has three digits
    assert torch.equal(ours[-1], theirs[-1])
    a, b = mine.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        torch.testing.assert_close(state, b["state"][number])


def test_matrices_do_not_change_each_other(processor: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(1)
    matrices = torch.randn(3, 6, 9, generator=numbers)
    together = orthogonalise(matrices, COEFFICIENTS, 5, 1e-7)
    alone = torch.cat([orthogonalise(matrix[None], COEFFICIENTS, 5, 1e-7) for matrix in matrices])
    digits = 1e-5 if processor == torch.float32 else 0.03
    torch.testing.assert_close(together, alone, rtol=digits, atol=digits)
    values = torch.linalg.svdvals(together)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_gradient_of_zeros_changes_nothing_but_decays() -> None:
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    matrix.grad = torch.zeros(4, 4)
    Muon([matrix], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 4), 0.95))


def test_a_closure_computes_the_loss() -> None:
    matrix = torch.nn.Parameter(torch.eye(4))

    def closure() -> float:
        loss = matrix.square().sum()
        loss.backward()
        return loss.item()

    assert Muon([matrix], lr=0.1).step(closure) == 4.0
    assert not torch.equal(matrix.detach(), torch.eye(4))
