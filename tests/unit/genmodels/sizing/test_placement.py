"""Test where models are kept: refused options, and the default budget of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genmodels.errors import SpecError
from genmodels.sizing.memory import HOST_MEMORY
from genmodels.sizing.placement import Placement
from services.gateway.model_host import ModelHost

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch report two GPUs of 80 GiB, of which 60 are free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * GIB, 80 * GIB))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: got 'tpu'; write cpu, cuda or cuda:<index>"),
        ({"device": "cuda:x"}, "device: got 'cuda:x'; write cpu, cuda or cuda:<index>"),
        ({"dtype": "float16"}, "dtype: got 'float16'; on cpu write float32 or bfloat16"),
        ({"device": "cuda", "dtype": "int8"}, "dtype: got 'int8'; on cuda write float32 or bfloat16 or float16"),
        ({"rows": 0}, "slots: got 0; write 1 to 1024"),
        ({"rows": 1025}, "slots: got 1025; write 1 to 1024"),
    ],
    ids=str,
)
def test_an_unknown_option_is_refused_with_its_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        Placement(**options)
    assert str(refusal.value) == message


def test_the_budget_is_the_memory_of_the_device(gpus: None) -> None:
    assert Placement().budget() == HOST_MEMORY
    assert Placement().budget(5) == 5
    assert Placement("cuda").budget() == int(60 * GIB * 0.8)
    assert Placement("cuda:1").budget(70 * GIB) == 70 * GIB
    with pytest.raises(SpecError, match=r"^memory: got 81\.0 GiB, and cuda has 80\.0 GiB; write less$"):
        Placement("cuda").budget(81 * GIB)
    with pytest.raises(SpecError, match=r"^device: got 'cuda:2', and this machine has 2 GPUs"):
        Placement("cuda:2").budget()


def test_a_host_for_a_missing_gpu_is_refused_before_it_reads_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"^device: got 'cuda', and this machine has no GPU that torch can use"):
        ModelHost("file:///no/such/folder", device="cuda")


def test_a_text_model_gets_more_rows_while_it_is_small() -> None:
    def memory(placement: Placement) -> int:
        return 10 * placement.rows

    rows = {small: Placement(small=small).for_texts(memory).rows for small in (0, 319, 320, 639, 640, 10**9)}
    assert rows == {0: 16, 319: 16, 320: 32, 639: 32, 640: 64, 10**9: 64}
    assert Placement(rows=40, small=10**9).for_texts(memory).rows == 64
    assert Placement(rows=100, small=10**9).for_texts(memory).rows == 100
