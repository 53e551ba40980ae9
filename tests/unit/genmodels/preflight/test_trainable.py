"""Test that a model which does not fit the memory of its machine is refused before it trains, with both numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genmodels import models
from genmodels.errors import SpecError
from genmodels.family import DataInfo, ImageInfo, TextInfo
from genmodels.preflight import parameters, trainable
from genmodels.sizing.memory import HOST_MEMORY
from genmodels.spec.sections import ModelSpec
from tests.support.tiny_jobs import job, make_data, model

GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def spec_of(data: Path, family: str) -> tuple[ModelSpec, DataInfo]:
    info: DataInfo = TextInfo(vocab_size=65) if family == "minigpt" else ImageInfo(channels=1, height=16, width=16)
    return job("tiny", model(data, family)).models[0], info


@pytest.mark.parametrize("family", models.names())
def test_the_memory_is_that_of_all_tensors(data: Path, family: str) -> None:
    spec, info = spec_of(data, family)
    built = models.load(family)(spec.model, info)
    roles = built.roles(spec.train)
    trained = [p for role in roles for p in role.loss.parameters()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for role in roles:
        for optimizer in role.optimizers:
            optimizer.step()
    moments = [
        value
        for role in roles
        for optimizer in role.optimizers
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
    ]
    weights = [tensor for role in roles for tensor in role.loss.state_dict().values()]
    saved = sum(tensor.nbytes for tensor in [*built.network.state_dict().values(), *weights, *moments])
    needed = sum(p.nbytes for p in trained) + 2 * saved
    assert trainable.footprint(spec, spec.model, info).total == pytest.approx(needed, rel=0.02)
    spec = spec.model_copy(update={"scaling": spec.scaling.model_copy(update={"use_gpu": True})})
    assert trainable.footprint(spec, spec.model, info).total == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("family", models.names())
def test_what_is_known_to_fit_a_host_also_fits_a_worker_of_that_memory(data: Path, family: str) -> None:
    """So most specs are checked without torch."""
    declared = models.declaration(family)
    assert declared.known_to_fit is not None
    config, info = declared.known_to_fit
    spec = spec_of(data, family)[0].model_copy(update={"model": config})
    for strategy, workers in (("ddp", 1), ("fsdp2", 2), ("fsdp2", 64)):
        train = spec.train.model_copy(update={"strategy": strategy})
        needed = trainable.footprint(spec.model_copy(update={"train": train}), config, info, workers).total
        assert needed * 1.2 <= HOST_MEMORY, strategy


def test_too_large_a_model_is_refused_with_the_numbers(data: Path) -> None:
    spec, info = spec_of(data, "minigpt")
    large = spec.model.model_copy(update={"n_embd": 1024, "n_layer": 24, "n_head": 16})  # 1.1 GiB of weights
    spec = spec.model_copy(update={"model": large})
    refused = r"model\.n_\w+: got \d+: it takes 1\d\.\d GiB of memory to train .* has 6\.0 GiB; write at most \d+$"
    with pytest.raises(SpecError, match=refused):
        trainable.check(spec, info, 6 * GIB, workers=1)
    trainable.check(spec, info, 12 * GIB, workers=1)
    trainable.check(spec, info, None, workers=1)
    on_gpu = spec.model_copy(update={"scaling": spec.scaling.model_copy(update={"use_gpu": True})})
    trainable.check(on_gpu, info, 6 * GIB, workers=1)


def test_workers_that_share_a_model_need_less_each(data: Path) -> None:
    spec, info = spec_of(data, "minigpt")
    large = spec.model.model_copy(update={"n_embd": 1024, "n_layer": 24, "n_head": 16})
    train = spec.train.model_copy(update={"strategy": "fsdp2"})
    spec = spec.model_copy(update={"model": large, "train": train})
    with pytest.raises(SpecError, match=r"has 6\.0 GiB; write at most \d+; or raise scaling\.num_workers"):
        trainable.check(spec, info, 6 * GIB, workers=1)
    trainable.check(spec, info, 6 * GIB, workers=4)
    needed = [trainable.footprint(spec, large, info, workers).total for workers in (1, 2, 4, 64)]
    assert needed == sorted(needed, reverse=True)
    served = 4 * parameters.count(models.load("minigpt"), large, info, spec.train).served
    assert needed[-1] == pytest.approx(2 * served, rel=0.1), "whole at an evaluation, and in a snapshot"
