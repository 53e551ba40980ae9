"""Test the decoder's static shapes, as a GPU uses them, on the CPU: few shapes, equal bits, and graphs that replay."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genmodels.declarations.minigpt import MiniGPTConfig
from genmodels.family import TextInfo
from genmodels.models.minigpt import MiniGPT, MiniGPTDecoder
from genmodels.nn import cuda_graphs
from genmodels.nn.cuda_graphs import Function, cuda_graph
from tests.support.recorded_graph import recorded_graph

BLOCK, SLOTS, VOCAB = 150, 16, 40
PLAIN: dict[str, Any] = {"positions": "learned", "norm": "layer", "mlp": "gelu", "qk_norm": False, "bias": True}


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": BLOCK, **options}
    return MiniGPT(MiniGPTConfig.model_validate(sizes), TextInfo(vocab_size=VOCAB)).network


NETWORKS = {"rotary": network(), "learned": network(**PLAIN)}


def logits_of(decoder: MiniGPTDecoder, token: int, company: dict[int, int], slot: int = 0) -> list[Tensor]:
    """Return the logits of one sequence at each step; the other slots hold sequences of given lengths."""
    rng = random.Random(0)
    for other, length in company.items():
        for start in range(0, length, decoder.chunk):
            decoder.prefill(other, [rng.randrange(VOCAB)] * min(decoder.chunk, length - start), start)
    rows = []
    for position in range(6):
        tokens: list[int | None] = [None] * SLOTS
        places = [0] * SLOTS
        tokens[slot], places[slot] = (token + position) % VOCAB, position
        for other, length in company.items():
            tokens[other], places[other] = rng.randrange(VOCAB), length + position
        rows.append(decoder.step(tokens, places)[slot])
    return rows


COMPANIES = [{1: 3}, {slot: slot * 7 for slot in range(1, 12)}, {15: 140, 2: 64}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("net", NETWORKS.values(), ids=list(NETWORKS))
def test_bits_are_equal_alone_and_in_company(net: Any, dtype: torch.dtype) -> None:
    decoder = MiniGPTDecoder(copy.deepcopy(net).to(dtype), BLOCK, SLOTS, static=True)
    alone = logits_of(decoder, 5, {})
    for company in COMPANIES:
        assert all(map(torch.equal, logits_of(decoder, 5, company), alone))
        others = {slot: length for slot, length in company.items() if slot != 9}
        assert all(map(torch.equal, logits_of(decoder, 5, others, slot=9), alone))


@pytest.mark.parametrize("net", NETWORKS.values(), ids=list(NETWORKS))
def test_graphs_give_the_bits_of_plain_steps(net: Any) -> None:
    """A replay repeats what was recorded, so it fails if a token, a position or a slot is not in a tensor."""
    eager = MiniGPTDecoder(net, BLOCK, SLOTS, static=True)
    replayed: list[torch.Size] = []

    def capture(function: Function, example: Tensor) -> Function:
        graph = recorded_graph(function, example)
        return lambda inputs: replayed.append(inputs.shape) or graph(inputs)

    graphs = MiniGPTDecoder(net, BLOCK, SLOTS, static=True, capture=capture)
    for company in ({}, *COMPANIES):
        for token in (5, 11):
            plain = logits_of(eager, token, company)
            assert all(map(torch.equal, logits_of(graphs, token, company), plain))
    assert len(replayed) == len(plain) * 2 * (1 + len(COMPANIES))  # each step


class _Shapes(TorchDispatchMode):
    """Collect the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[Any] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import takes seconds

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.shapes.add(tuple(tuple(one.shape) for one in args if isinstance(one, Tensor)))
        return function(*args, **(kwargs or {}))


def products(steps: int) -> int:
    """Return the number of shapes of products in random steps of one layer, with few and many slots in turn."""
    decoder = MiniGPTDecoder(network(n_layer=1), BLOCK, SLOTS, static=True)
    rng, loads = random.Random(0), itertools.cycle(itertools.product((4, 8, 16), (32, 64, 128, BLOCK)))
    with _Shapes() as seen:
        for last, length in itertools.islice(loads, steps):
            used = {rng.randrange(last), last - 1}
            tokens = [rng.randrange(VOCAB) if slot in used else None for slot in range(SLOTS)]
            decoder.step(tokens, [length - 1 if slot == last - 1 else rng.randrange(length) for slot in range(SLOTS)])
    return len(seen.shapes)


def test_the_number_of_shapes_has_a_bound() -> None:
    heights, lengths = 3, 4
    weights, attention = 5, 2  # products of one layer and the head
    assert products(12) == products(200) <= heights * (weights + attention * lengths)


def test_a_graph_that_cannot_be_recorded_or_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    monkeypatch.setattr(cuda_graphs, "_recorded", lambda function, example: lambda x: 3 * x)
    assert cuda_graph(double, torch.ones(2)) is double
    monkeypatch.setattr(cuda_graphs, "_recorded", lambda *_: (_ for _ in ()).throw(RuntimeError("not permitted")))
    assert cuda_graph(double, torch.ones(2)) is double
    assert [record.getMessage() for record in caplog.records] == [
        "a CUDA graph of shape (2,) gives another result, and is not used",
        "shape (2,) cannot be captured as a CUDA graph: not permitted",
    ]
    monkeypatch.setattr(cuda_graphs, "_recorded", lambda function, example: lambda x: x + x)
    assert cuda_graph(double, torch.ones(2)) is not double


def network_in(net: Any, dtype: torch.dtype) -> Any:
    import copy

    return copy.deepcopy(net).to(dtype)
