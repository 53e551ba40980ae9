"""Test what a dry run costs, and which requests wait for it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from genmodels import models
from genmodels.data import DataConfig, open_dataset, uploads
from genmodels.family import ImageInfo, OptimizerConfig, TextInfo
from genmodels.keys import Keys
from genmodels.preflight import parameters
from genmodels.preflight.parameters import Parameters, count
from genmodels.storage import Storage
from services.jobs.app import create_app
from services.jobs.routes import DRY_RUNS
from tests.support.asgi_server import served
from tests.support.job_service import YAML, Service, spec


def giants(depths: range) -> bytes:
    """Return a spec with one deep language model per entry."""
    document = spec("giants", *(f"m{depth}" for depth in depths))
    for model, depth in zip(document["models"], depths, strict=True):
        model |= {"model": {"family": "minigpt", "n_layer": depth}, "data": {"dataset": "shakespeare"}}
    return yaml.safe_dump(document).encode()


def random_config(cls: Any, chance: random.Random) -> Any:
    """Return a configuration with random values in the fields that change the model."""
    fields: dict[str, Any] = {"width": chance.choice([1, 3, 8, 20]), "latent_dim": chance.randint(1, 60)}
    fields |= {"blocks": chance.randint(0, 8), "norm": chance.choice(["group", "none"])}
    fields |= {"conditional": chance.random() < 0.5, "noise_std": chance.choice([0.0, 0.5])}
    fields |= {"n_layer": chance.randint(1, 12), "n_head": chance.choice([1, 2, 4]), "n_embd": 8 * chance.randint(1, 9)}
    fields |= {"block_size": chance.randint(2, 99), "positions": chance.choice(["learned", "rotary"])}
    fields |= {"mlp": chance.choice(["relu", "gelu", "swiglu"])}
    fields |= {name: chance.random() < 0.5 for name in ("qk_norm", "tied_head", "bias")}
    if cls.kind == "text":
        fields["norm"] = chance.choice(["layer", "rms"])
    return cls.Config(**{name: value for name, value in fields.items() if name in cls.Config.model_fields})


@pytest.mark.slow
@pytest.mark.parametrize("family", models.names())
def test_parameters_are_counted_as_they_are_built(family: str) -> None:
    """The count is exact for any configuration and data of any family, with either optimizer."""
    import torch
    from torch.optim import Muon

    cls, chance = models.load(family), random.Random(family)
    for _ in range(25):
        config = random_config(cls, chance)
        sides = {"height": chance.randint(8, 70), "width": chance.randint(8, 70)}
        pictures = ImageInfo(channels=chance.choice([1, 3]), num_classes=chance.randint(2, 9), **sides)
        data = TextInfo(vocab_size=chance.randint(2, 300)) if cls.kind == "text" else pictures
        optimizer = OptimizerConfig(optimizer=chance.choice(["adamw", "muon"]))
        with torch.device("meta"):
            built = cls(config, data)
            roles = built.roles(optimizer)
        moments = sum(
            parameter.numel() * (1 if isinstance(one, Muon) else 2)
            for role in roles
            for one in role.optimizers
            for group in one.param_groups
            for parameter in group["params"]
        )
        state = [*built.network.state_dict().values(), *(t for r in roles for t in r.loss.state_dict().values())]
        trained = sum(parameter.numel() for role in roles for parameter in role.loss.parameters())
        counted = count(cls, config, data, optimizer)
        assert (counted.trained, counted.saved) == (trained, sum(tensor.numel() for tensor in state) + moments), config


def test_depth_costs_a_dry_run_nothing(file_storage: Storage) -> None:
    """A hundred models of up to 128 layers: two are built, of one layer and of two."""
    parameters._built.cache_clear()
    response = Service(file_storage).post(giants(range(29, 129)), "?dry_run=true")
    sizes = [model["parameters"] for model in response.json()["models"]]
    assert len({deeper - shallower for shallower, deeper in pairwise(sizes)}) == 1
    assert parameters._built.cache_info().misses == 2


def test_samples_are_those_of_training_and_no_data_is_read(
    file_storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation part has a tenth of each class, so that its size is not a tenth of the whole."""
    for number in range(49):
        folder = tmp_path / "pictures" / ("few" if number < 9 else "many")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    uploads.add(file_storage, "pictures", tmp_path / "pictures", 8)
    training = len(open_dataset(DataConfig(path=str(tmp_path / "pictures"), image_size=8)).split("train"))
    monkeypatch.setenv("GENMODELS_DATA", str(tmp_path / "empty"))
    document = spec("x", "own", "built-in")
    document["models"][0]["data"] = {"dataset": "pictures"}
    own, built_in = Service(file_storage).post(document, "?dry_run=true").json()["models"]
    assert (own["samples"], built_in["samples"]) == (training, 4500)
    assert not (tmp_path / "empty").exists()


class Counting:
    """Replace the function that counts a model's parameters; each call waits for `let`."""

    def __init__(self) -> None:
        self.begun, self.let = 0, threading.Event()

    def __call__(self, *_: Any) -> Parameters:
        self.begun += 1
        assert self.let.wait(20)
        return Parameters(1, 1, 1)

    def until_begun(self, number: int) -> None:
        deadline = time.monotonic() + 20
        while self.begun < number:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(parameters, "count", counting)
    return counting


def test_dry_runs_of_one_key_are_bounded_and_keep_nobody_waiting(file_storage: Storage, counting: Counting) -> None:
    keys = Keys(file_storage)
    mine, other = ({"authorization": f"Bearer {keys.create(name, ('submit',))[1]}"} for name in ("mine", "other"))
    with served(create_app(file_storage, keys=keys, hosts=None)) as url:

        async def play() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:

                async def dry_run(key: dict[str, str]) -> int:
                    body = giants(range(1, 3))
                    answer = await client.post("/v1/jobs?dry_run=true", content=body, headers={**YAML, **key})
                    return answer.status_code

                running = [asyncio.create_task(dry_run(mine)) for _ in range(41)]
                refused, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                while len(refused) < 41 - DRY_RUNS[1]:
                    await asyncio.sleep(0.01)
                    refused = {one for one in running if one.done()}
                assert {one.result() for one in refused} == {429}
                assert (await client.get("/v1/jobs", headers=other)).status_code == 200
                running.append(asyncio.create_task(dry_run(other)))
                counting.let.set()
                codes = await asyncio.gather(*running)
                assert (codes.count(200), codes[-1]) == (DRY_RUNS[1] + 1, 200)

        asyncio.run(play())


def test_a_dry_run_ends_with_its_client(file_storage: Storage, counting: Counting) -> None:
    """Active dry runs stop at the next model; waiting dry runs never begin."""
    with served(create_app(file_storage, keys=None, hosts=None)) as url:

        async def play() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                body = giants(range(1, 101))
                requests = [
                    asyncio.create_task(client.post("/v1/jobs?dry_run=true", content=body, headers=YAML))
                    for _ in range(DRY_RUNS[1])
                ]
                await asyncio.to_thread(counting.until_begun, 2)
                for request in requests:
                    request.cancel()
                await asyncio.gather(*requests, return_exceptions=True)
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:  # the places are free again
                waiting = asyncio.create_task(
                    client.post("/v1/jobs?dry_run=true", content=giants(range(1, 2)), headers=YAML)
                )
                await asyncio.sleep(0)
                counting.let.set()
                assert (await waiting).status_code in (200, 429)

        asyncio.run(play())
        last = httpx.post(f"{url}/v1/jobs?dry_run=true", content=giants(range(1, 2)), headers=YAML, timeout=30)
        assert last.status_code == 200
    assert counting.begun <= 2 + 2
