"""Test models in each dtype of a device: probes, equal bits alone and in company, and on a GPU graphs and copies.

Without a GPU only bfloat16 on the CPU is tested here: `make test-gpu` says what was not run.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genmodels.engine.image import answers
from genmodels.engine.image.requests import DecodeRequest, GenerateRequest
from genmodels.engine.loader import load_folder
from genmodels.engine.text.completion import complete
from genmodels.engine.text.request import CompletionRequest
from genmodels.engine.warmup import warm_up
from genmodels.registry.probe import verify_probe, write_probe
from genmodels.sizing.placement import NUMBER_BYTES, Placement
from tests.support.published_models import CONFIGS, build, write

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: this machine has no GPU that torch can use")
PLACEMENTS = [
    pytest.param(Placement(dtype="bfloat16"), id="cpu-bfloat16"),
    *(pytest.param(Placement("cuda", dtype), id=f"cuda-{dtype}", marks=GPU) for dtype in NUMBER_BYTES),
]


def model_in(folder: Path, name: str, placement: Placement) -> Any:
    """Return a model that is verified as a host verifies it."""
    placement.prepare()
    family, assets = build(name)
    write(folder, family, assets)
    write_probe(family, folder)
    model = load_folder(folder, "m@1", placement)
    assert {weight.dtype for weight in model.family.network.parameters()} == {placement.torch_dtype}
    verify_probe(model.family, folder)
    warm_up(model)
    return model


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"minigpt"}))
def test_images_are_equal_alone_and_in_company(name: str, placement: Placement, tmp_path: Path) -> None:
    model = model_in(tmp_path, name, placement)
    many = answers.answer(model, GenerateRequest(n=20, seed=3)).images
    assert answers.answer(model, GenerateRequest(n=2, seed=3)).images == many[:2]
    request = DecodeRequest(latents=[[0.1] * model.family.latent_dim], output_format="npy")
    (file,) = answers.answer(model, request).images
    exact = load_folder(tmp_path, "m@1")
    (reference,) = answers.answer(exact, request).images
    difference = np.frombuffer(file[-1024:], np.float32) - np.frombuffer(reference[-1024:], np.float32)
    assert abs(difference).max() < 0.05


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_texts_are_equal_alone_and_in_company(placement: Placement, tmp_path: Path) -> None:
    model = model_in(tmp_path, "minigpt", placement)
    fields: dict[str, Any] = {"max_tokens": 20, "logprobs": 1, "top_p": 0.9}

    def texts(prompts: list[str], seeds: list[int]) -> list[Any]:
        request = CompletionRequest.model_validate({"prompt": prompts, "seed": seeds, **fields})
        deltas = list(complete(model, request))
        return [[(one.text, one.logprobs) for one in deltas if one.index == i] for i in range(len(prompts))]

    together = texts(["ABC", "Hello", "x", "To be, or not", "A"], [1, 2, 3, 4, 5])
    assert texts(["Hello"], [2]) == [together[1]]
    assert texts(["A"], [5]) == [together[4]]


@GPU
@pytest.mark.parametrize("dtype", NUMBER_BYTES)
def test_steps_of_a_gpu_are_graphs_that_wait_for_one_copy(dtype: Any, tmp_path: Path) -> None:
    model = model_in(tmp_path, "minigpt", Placement("cuda", dtype))
    replays = model.batcher._decoder._replays.values()
    assert replays
    assert not any(isinstance(replay, partial) for replay in replays)  # each is a graph
    list(complete(model, CompletionRequest.model_validate({"prompt": "A", "n": 8, "max_tokens": 4})))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            list(complete(model, CompletionRequest.model_validate({"prompt": "A", "n": 8, "max_tokens": 8, "seed": 1})))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 8  # tokens of 8 steps
