"""Test the engine on a fake GPU: each tensor is made there, answers are equal, and copies to the host are counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genmodels.data.images import pixels_of
from genmodels.engine.image import answers
from genmodels.engine.image.requests import VERB_REQUESTS, GenerateRequest, ImageRequest
from genmodels.engine.loader import load_folder
from genmodels.engine.text.completion import complete
from genmodels.engine.text.request import CompletionRequest
from genmodels.engine.warmup import warm_up
from genmodels.models import minigpt
from genmodels.registry.probe import finite_probe, verify_probe, write_probe
from genmodels.sizing.placement import DEFAULT_PLACEMENT, Placement
from tests.support.fake_gpu import FakeGpu, fake_gpu
from tests.support.published_models import CONFIGS, build, write

GPU = Placement("cuda")
IMAGE_FAMILIES = sorted(CONFIGS.keys() - {"minigpt"})
IMAGE = [[(row * 16 + column) / 255 for column in range(16)] for row in range(16)]
FIELDS: dict[str, dict[str, Any]] = {
    "generate": {"n": 3, "seed": 5},
    "encode": {"images": [IMAGE] * 2},
    "decode": {"latents": [[0.1] * 4, [0.2] * 4]},
    "reconstruct": {"images": [IMAGE] * 2},
    "denoise": {"images": [IMAGE] * 2},
    "interpolate": {"start": 1, "end": IMAGE, "steps": 3},
}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {"3": 4}},
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(minigpt, "cuda_graph", lambda function, example: function)
    with fake_gpu() as gpu:
        yield gpu


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write(tmp_path, *build(request.param))
    return tmp_path


def fields_of(verb: str, name: str) -> dict[str, Any]:
    if name != "gan":
        return FIELDS[verb]
    return FIELDS[verb] | {"decode": {"latents": [[0.1] * 8] * 2}, "interpolate": {"end": 2}}.get(verb, {})


def on(folder: Path, placement: Placement = DEFAULT_PLACEMENT) -> Any:
    return load_folder(folder, "m@1", placement)


@pytest.mark.parametrize("folder", IMAGE_FAMILIES, indirect=True)
def test_images_are_made_on_the_gpu_and_copied_back_once_as_bytes(folder: Path, gpu: FakeGpu) -> None:
    on_cpu, on_gpu = on(folder), on(folder, GPU)
    name = on_gpu.family.family_name()
    requests: tuple[type[ImageRequest], ...] = (GenerateRequest, *VERB_REQUESTS)
    verbs = {request.verb: request for request in requests}
    for verb in sorted(on_gpu.family.verbs):
        request = verbs[verb].model_validate(fields_of(verb, name))
        gpu.forget()
        answer = answers.answer(on_gpu, request)
        copies, endpoints = gpu.to_host, verb == "interpolate" and name != "gan"
        assert answer == answers.answer(on_cpu, request), verb
        assert len(copies) == 1 + endpoints, verb  # an end that is an image is encoded before
        assert copies[-1][1] == (torch.float32 if verb == "encode" else torch.uint8), verb
        assert gpu.reads == []


@pytest.mark.parametrize("folder", ["minigpt"], indirect=True)
@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_a_step_copies_its_tokens_and_no_more(folder: Path, gpu: FakeGpu, options: dict[str, Any]) -> None:
    on_cpu, on_gpu = on(folder), on(folder, GPU)
    for more, copies in (({}, 1), ({"logprobs": 2}, 2)):
        fields = {"prompt": ["ABC", "Hello"], "n": 2, "max_tokens": 12, "seed": 1, **options, **more}
        request = CompletionRequest.model_validate(fields)
        steps = on_gpu.batcher.step

        def step(steps: Any = steps, copies: int = copies) -> bool:
            gpu.forget()
            busy: bool = steps()
            assert len(gpu.to_host) <= copies
            assert gpu.reads == []
            return busy

        on_gpu.batcher.step = step
        texts = [(delta.index, delta.text) for delta in complete(on_gpu, request)]
        on_gpu.batcher.step = steps
        assert texts == [(delta.index, delta.text) for delta in complete(on_cpu, request)]


@pytest.mark.parametrize("folder", ["minigpt"], indirect=True)
def test_the_prompt_is_scored_with_one_copy_for_each_part(folder: Path, gpu: FakeGpu) -> None:
    on_cpu, on_gpu = on(folder), on(folder, GPU)
    request = CompletionRequest.model_validate({"prompt": "Hello", "echo": True, "max_tokens": 0, "logprobs": 1})
    on_gpu.batcher  # noqa: B018
    gpu.forget()
    deltas = list(complete(on_gpu, request))
    assert (len(gpu.to_host), gpu.reads) == (1, [])
    assert deltas == list(complete(on_cpu, request))


@pytest.mark.parametrize("folder", sorted(CONFIGS), indirect=True)
def test_a_model_is_verified_and_warmed_up_on_the_gpu(folder: Path, gpu: FakeGpu) -> None:
    write_probe(on(folder).family, folder)
    model = on(folder, GPU)
    assert {output.device.type for output in model.family.probe().values()} == {"cuda"}
    finite_probe(model.family)
    gpu.forget()
    verify_probe(model.family, folder)
    assert len(gpu.to_host) == len(model.family.probe())
    assert warm_up(model) == warm_up(on(folder))


@pytest.mark.parametrize("folder", ["vae"], indirect=True)
def test_the_fake_finds_a_forgotten_device(folder: Path, gpu: FakeGpu) -> None:
    model = on(folder, GPU)
    decode = model.family.decode

    def forgetful(latents: Tensor, request: Any) -> Tensor:
        return decode(latents + torch.zeros(latents.shape[1]), request)

    model.family.decode = forgetful
    with pytest.raises(RuntimeError, match=r"a tensor \(4,\) is on the CPU, others on the GPU"):
        answers.answer(model, GenerateRequest())
    moved = next(model.family.network.parameters()).detach()
    with pytest.raises(AssertionError, match="a mask as an index is copied to the host"):
        moved[moved > 0]
    assert bool((moved == moved).all())
    assert len(gpu.reads) == 1


def test_pictures_round_as_before() -> None:
    values = torch.linspace(-0.1, 1.1, 3 * 7 * 11).view(3, 1, 7, 11)
    assert (answers._pixels(values, "latents") == pixels_of(values.numpy())).all()
