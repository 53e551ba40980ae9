"""Test dynamic batching of images: a result is the same bits in any batch; large requests do not block small ones."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genmodels.engine.image import answers
from genmodels.engine.image.answers import ImageAnswer
from genmodels.engine.image.batcher import DynamicBatcher
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import (
    MAX_FLOAT32,
    DecodeRequest,
    EncodeRequest,
    GenerateRequest,
    InterpolateRequest,
    ReconstructRequest,
)
from genmodels.errors import RequestError
from genmodels.sizing.memory import SERVED_ROWS
from tests.support.published_models import loaded
from tests.support.schema_bounds import any_value


@pytest.fixture(scope="module", params=["vae", "gan", "autoencoder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageModel:
    result = loaded(request.param, tmp_path_factory.mktemp(request.param))
    assert isinstance(result, ImageModel)
    return result


class Gate:
    """Act as a function that waits until the gate is open, and keeps its batches."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.batches: list[torch.Tensor] = []

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.batches.append(rows)
        self.entered.set()
        self.open.wait(10)
        return rows * 2


def waiting(batcher: DynamicBatcher, count: int) -> None:
    """Wait until so many requests are in the queue."""
    for _ in range(10_000):
        if len(batcher._waiting) == count:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{len(batcher._waiting)} wait, not {count}")


def rows(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None]


def test_waiting_calls_share_a_batch_and_get_their_own_rows() -> None:
    batcher, gate = DynamicBatcher(), Gate()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher.apply, "k", gate, rows(0, 1))
        gate.entered.wait(10)
        others = []
        for i in range(4):
            others.append(pool.submit(batcher.apply, "k", gate, rows(100 * i, 3)))
            waiting(batcher, i + 1)
        gate.open.set()
        assert first.result().tolist() == [[0.0]]
        for i, other in enumerate(others):
            assert torch.equal(other.result(), rows(100 * i, 3) * 2)
    assert [len(part) for part in gate.batches] == [SERVED_ROWS, SERVED_ROWS]


def test_a_large_request_takes_turns_with_small_ones() -> None:
    batcher, gate = DynamicBatcher(), Gate()
    with ThreadPoolExecutor(8) as pool:
        large = pool.submit(batcher.apply, "k", gate, rows(0, 4 * SERVED_ROWS))
        gate.entered.wait(10)
        small = pool.submit(batcher.apply, "k", gate, rows(1000, 2))
        waiting(batcher, 2)
        gate.open.set()
        assert torch.equal(small.result(), rows(1000, 2) * 2)
        assert torch.equal(large.result(), rows(0, 4 * SERVED_ROWS) * 2)
    index = next(i for i, part in enumerate(gate.batches) if 1000 in part)
    assert index == 2 - 1 or len(gate.batches[index]) == SERVED_ROWS
    assert index <= 2


def test_other_options_are_another_batch() -> None:
    batcher = DynamicBatcher()

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RequestError("no such label", param="label")

    assert torch.equal(batcher.apply("good", lambda x: x + 1, rows(0, 3)), rows(1, 3))
    for _ in range(2):
        with pytest.raises(RequestError, match="no such label"):
            batcher.apply("bad", fail, rows(0, SERVED_ROWS + 1))
    assert torch.equal(batcher.apply("good", lambda x: x + 1, rows(0, 3)), rows(1, 3))
    assert not batcher._waiting


def test_a_row_that_fails_fails_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, gate = DynamicBatcher(), Gate()
    computed: list[int] = []

    def odd_fail(part: torch.Tensor) -> torch.Tensor:
        computed.append(len(part))
        if (part % 2 == 1).any():
            raise RequestError("odd", param="rows")
        return part * 2

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(batcher.apply, "gate", gate, rows(0, 1))
        gate.entered.wait(10)
        parts = [
            torch.full((count, 1), float(value)) for value, count in ((2, 3), (5, 2), (4, SERVED_ROWS), (7, 20), (6, 1))
        ]
        futures = []
        for part in parts:
            futures.append(pool.submit(batcher.apply, "k", odd_fail, part))
            waiting(batcher, len(futures))
        gate.open.set()
        first.result()
        for part, one in zip(parts, futures, strict=True):
            if part[0, 0] % 2:
                with pytest.raises(RequestError, match="odd"):
                    one.result(10)
            else:
                assert torch.equal(one.result(10), part * 2)
    assert set(computed) == {SERVED_ROWS}  # including rows that were retried alone
    assert not batcher._waiting


def test_an_answer_is_the_same_alone_and_in_company(model: ImageModel) -> None:
    requests: list[Any] = [GenerateRequest(n=1 + i % 5, seed=i) for i in range(24)]
    requests += [GenerateRequest.model_validate({"n": 2, "seed": i, "temperature": 0.5}) for i in range(6)]
    requests += [DecodeRequest(latents=[[0.1 * i] * model.family.latent_dim]) for i in range(6)]
    if "encode" in model.family.verbs:
        requests += [EncodeRequest(images=[np.full((16, 16), i / 8).tolist()]) for i in range(6)]
    alone = [answers.answer(model, request) for request in requests]
    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            assert list(pool.map(lambda request: answers.answer(model, request), requests)) == alone


def odd_requests(model: ImageModel) -> st.SearchStrategy[Any]:
    """Generate valid requests whose numbers lie at the bounds."""
    options = {
        name: any_value(field)
        for name, field in model.family.Request.model_json_schema()["properties"].items()
        if name != "label"  # this model has no classes
    }
    seeds = st.sampled_from([0, 2**63 - 1]) | st.integers(0, 2**63 - 1)
    number = st.sampled_from([0.0, -0.0, 5e-324, 1e-310, MAX_FLOAT32, -MAX_FLOAT32]) | st.floats(-9, 9)
    latent = st.lists(number, min_size=model.family.latent_dim, max_size=model.family.latent_dim)
    kinds: list[tuple[Any, dict[str, st.SearchStrategy[Any]]]] = [
        (GenerateRequest, {"n": st.integers(1, 20), "seed": seeds}),
        (GenerateRequest, {"seed": st.lists(seeds, min_size=1, max_size=20)}),
        (DecodeRequest, {"latents": st.lists(latent, min_size=1, max_size=20)}),
        (InterpolateRequest, {"start": seeds | latent, "end": seeds | latent, "steps": st.integers(2, 20)}),
    ]
    if "encode" in model.family.verbs:
        pixel = st.sampled_from([0, 1, 5e-324, 1.0])
        pictures = st.lists(pixel.map(lambda value: [[value] * 16] * 16), min_size=1, max_size=20)
        kinds += [(EncodeRequest, {"images": pictures}), (ReconstructRequest, {"images": pictures})]
    return st.one_of(st.fixed_dictionaries(fields, optional=options).map(kind.model_validate) for kind, fields in kinds)


@given(data=st.data())
@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
def test_no_request_changes_or_fails_another(model: ImageModel, data: st.DataObject) -> None:
    honest: list[Any] = [GenerateRequest(n=1 + i % 3, seed=i, output_format="npy") for i in range(6)]
    honest += [DecodeRequest(latents=[[0.1 * i] * model.family.latent_dim]) for i in range(3)]
    alone = [answers.answer(model, request) for request in honest]
    odd = data.draw(st.lists(odd_requests(model), min_size=4, max_size=8))

    def answered(request: Any) -> Any:
        try:
            return answers.answer(model, request)
        except RequestError as error:
            return error.status

    with ThreadPoolExecutor(12) as pool:
        result = list(pool.map(answered, [*odd, *honest]))
    assert result[len(odd) :] == alone
    assert all(isinstance(one, ImageAnswer) or one == 400 for one in result)


def test_a_list_of_seeds_gives_the_picture_of_each(model: ImageModel) -> None:
    seeds = [5, 0, 5, 2**63 - 1]
    result = answers.answer(model, GenerateRequest(seed=seeds))
    assert result.seed == seeds
    assert result.images == tuple(answers.answer(model, GenerateRequest(seed=seed)).images[0] for seed in seeds)
    assert answers.answer(model, GenerateRequest(seed=seeds, n=4)) == result
    with pytest.raises(RequestError, match="n: got 3, and 4 seeds"):
        answers.answer(model, GenerateRequest(seed=seeds, n=3))


def test_npy_files_hold_what_the_picture_shows(model: ImageModel) -> None:
    answer = answers.answer(model, GenerateRequest(n=2, seed=1, output_format="npy"))
    arrays = [np.load(io.BytesIO(file), allow_pickle=False) for file in answer.images]
    assert [(array.shape, array.dtype) for array in arrays] == [((1, 16, 16), np.dtype("float32"))] * 2
    shown = [png_pixels(file) for file in answers.answer(model, GenerateRequest(n=2, seed=1)).images]
    for array, pixels in zip(arrays, shown, strict=True):
        assert np.abs(array[0] * 255 - pixels).max() <= 0.51
    with pytest.raises(ValueError, match="a grid is a PNG"):
        GenerateRequest(grid=True, output_format="npy")


def test_ways_between_two_points(model: ImageModel) -> None:
    def interpolated(method: Any) -> ImageAnswer:
        return answers.answer(model, InterpolateRequest(start=1, end=2, steps=5, method=method))

    straight, round_, own = interpolated("linear"), interpolated("spherical"), interpolated(None)
    assert straight.images[0] == round_.images[0]
    assert straight.images[2] != round_.images[2]
    assert own == (straight if model.family.family_name() == "autoencoder" else round_)


def test_more_pixels_than_an_answer_holds_are_refused_before_they_are_made(
    model: ImageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_PIXELS", 16 * 16 * 4)
    monkeypatch.setattr(model.batcher, "apply", lambda *_: 1 / 0)
    with pytest.raises(RequestError, match=r"n: got 5 images, expected at most 4 "):
        answers.answer(model, GenerateRequest(n=5))


def png_pixels(file: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(file)).convert("L"), dtype=np.float32)


def test_image_files_are_sent_as_base64(tmp_path: Path) -> None:
    from genmodels.storage import open_storage
    from services.gateway.model_host import ModelHost
    from services.gateway.routes import create_app
    from tests.support.asgi_client import ask
    from tests.support.published_models import publish

    storage = open_storage(tmp_path.as_uri())
    publish(storage, "shapes", "vae")
    body = {"model": "shapes", "seed": [1, 2], "output_format": "npy"}
    answer = ask(create_app(ModelHost(storage.url)), "POST", "/v1/images/generations", body).json()
    assert answer["seed"] == [1, 2]
    files = [base64.b64decode(item["b64_json"]) for item in answer["data"]]
    assert [np.load(io.BytesIO(file)).shape for file in files] == [(1, 16, 16)] * 2
