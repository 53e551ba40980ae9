from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from genmodels import models
from genmodels.data.images import png
from genmodels.data.text import CharTokenizer
from genmodels.engine.image import answers
from genmodels.engine.image.model import ImageModel
from genmodels.engine.image.requests import (
    DecodeRequest,
    DenoiseRequest,
    EncodeRequest,
    GenerateRequest,
    ImageRequest,
    InterpolateRequest,
    ReconstructRequest,
)
from genmodels.engine.loader import load, load_folder
from genmodels.engine.model import LoadedModel
from genmodels.engine.text import completion
from genmodels.engine.text.choices import TextDelta, choice_seed
from genmodels.engine.text.completion import complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.engine.text.stops import StopStrings
from genmodels.errors import CheckpointError, ModelNotFound, RequestError
from genmodels.nn.sampling import SamplingOptions
from genmodels.registry.references import of_version
from genmodels.registry.store import Registry
from genmodels.storage import Storage
from tests.support.published_models import IMAGES, VOCABULARY, loaded, publish

IMAGE_FAMILIES = [name for name in models.names() if models.load(name).kind == "image"]
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a tiny untrained model of a family, once."""
    made: dict[str, LoadedModel] = {}

    def make(name: str) -> LoadedModel:
        if name not in made:
            made[name] = loaded(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


class Scripted:
    """Act as a text family that repeats a given text, after a prompt of one token."""

    Request = SamplingOptions
    verbs = frozenset({"complete"})
    block_size = 64

    def __init__(self, says: str) -> None:
        self.says = CharTokenizer(VOCABULARY).encode(says)
        self.steps = 0

    def family_name(self) -> str:
        return "scripted"

    def decoder(self, slots: int) -> Scripted:
        return self

    def step(self, tokens: Sequence[int | None], positions: Sequence[int]) -> Tensor:
        self.steps += 1
        drawn = torch.tensor([self.says[position % len(self.says)] for position in positions])
        return torch.nn.functional.one_hot(drawn, len(VOCABULARY)) * 1e6


def scripted(says: str) -> TextModel:
    return TextModel("scripted@1", Scripted(says), CharTokenizer(VOCABULARY))


def choices(deltas: Iterator[TextDelta], n: int = 1) -> list[tuple[str, str | None, int]]:
    """Return text, finish_reason and tokens of each choice."""
    listed = list(deltas)
    result = []
    for index in range(n):
        own = [delta for delta in listed if delta.index == index]
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        result.append(("".join(delta.text for delta in own), own[-1].finish_reason, sum(delta.tokens for delta in own)))
    return result


def request_error(function: Callable[[], Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        function()
    return caught.value


# Text


def test_a_completion_ends_at_max_tokens() -> None:
    assert choices(iter(complete(scripted("Hello"), CompletionRequest(prompt="x", max_tokens=3)))) == [
        ("Hel", "length", 3)
    ]
    assert choices(iter(complete(scripted("Hello"), CompletionRequest(prompt="x", max_tokens=7)))) == [
        ("HelloHe", "length", 7)
    ]


def test_stop_strings_are_never_shown_and_end_the_work() -> None:
    model = scripted("one two three four")
    request = CompletionRequest(prompt="x", stop=["three", "w"])
    assert choices(iter(complete(model, request))) == [("one t", "stop", 6)]
    assert model.family.steps == 6  # type: ignore[attr-defined]
    held_back = CompletionRequest(prompt="x", stop="bc", max_tokens=3)
    assert choices(iter(complete(scripted("a b"), held_back))) == [("a b", "length", 3)]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.data())
def test_where_text_is_cut_does_not_change_what_a_stop_string_cuts_off(
    says: str, stops: list[str], data: st.DataObject
) -> None:
    ends = [(says.find(stop) + len(stop), says.find(stop)) for stop in stops if stop in says]
    expected = says[: min(ends)[1]] if ends else says
    scanner, shown = StopStrings(stops), ""
    while says and not scanner.matched:
        size = data.draw(st.integers(1, len(says)))
        shown += scanner.feed(says[:size])
        says = says[size:]
        assert expected.startswith(shown)
    assert shown + ("" if scanner.matched else scanner.rest()) == expected
    assert scanner.matched == bool(ends)


def test_each_choice_has_its_own_seed_and_the_first_has_the_requests(make: Make) -> None:
    answer = complete(make("minigpt"), CompletionRequest(prompt="x", n=3, seed=7, max_tokens=20, temperature=2))
    seeds = [7, choice_seed(7, 1), choice_seed(7, 2)]
    alone = [
        complete(make("minigpt"), CompletionRequest(prompt="x", seed=seed, max_tokens=20, temperature=2))
        for seed in seeds
    ]
    assert choices(iter(answer), 3) == [result for one in alone for result in choices(iter(one))]
    assert len({choice_seed(seed, index) for seed in range(50) for index in range(50)}) == 2500
    assert 0 <= choice_seed(2**63 - 1, 63) < 2**63


def test_a_completion_without_a_seed_tells_the_one_it_took(make: Make) -> None:
    first = complete(make("minigpt"), CompletionRequest(prompt="To be", max_tokens=20))
    again = complete(make("minigpt"), CompletionRequest(prompt="To be", max_tokens=20, seed=first.seed))
    other = complete(make("minigpt"), CompletionRequest(prompt="To be", max_tokens=20))
    assert choices(iter(first)) == choices(iter(again))
    assert first.seed != other.seed
    assert first.prompt_tokens == 5


@pytest.mark.parametrize("length", [1, 2, 9, 16, 17, 40])
def test_an_echoed_prompt_is_measured_where_the_model_reads_it(make: Make, length: int) -> None:
    """The log-probabilities of the prompt are those of the network for the window; block_size is 16."""
    model, prompt = make("minigpt"), (VOCABULARY * 2)[:length]
    request = CompletionRequest(prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    (delta,) = complete(model, request)
    assert (delta.text, delta.tokens, delta.finish_reason) == (prompt, 0, "length")
    window = model.tokenizer.encode(prompt) if length <= 16 else model.tokenizer.encode(prompt)[-8:]
    expected = model.family.logits(torch.tensor([window]))[0].double().log_softmax(-1)
    unread = length - len(window) + 1
    assert [token.logprob for token in delta.logprobs[:unread]] == [None] * unread
    for place, token in enumerate(delta.logprobs[unread:]):
        assert token.text == prompt[unread + place]
        assert token.logprob == pytest.approx(float(expected[place, window[place + 1]]), abs=1e-5)
        assert token.top is not None
        assert max(token.top.values()) == pytest.approx(float(expected[place].max()), abs=1e-5)
    assert [token.offset for token in delta.logprobs] == list(range(length))


def test_log_probabilities_come_with_their_text() -> None:
    request = CompletionRequest(prompt="x", stop="cd", max_tokens=3, logprobs=0)
    deltas = list(complete(scripted("abc"), request))
    assert ["".join(token.text for token in delta.logprobs) for delta in deltas] == ["a", "b", "", "c"]
    stopped = list(complete(scripted("abcd"), CompletionRequest(prompt="x", stop="cd", max_tokens=9, logprobs=0)))
    assert "".join(token.text for delta in stopped for token in delta.logprobs) == "ab"


def test_log_probabilities_are_the_same_alone_and_in_company(make: Make) -> None:
    request = CompletionRequest(prompt="To be", seed=4, max_tokens=30, logprobs=5, echo=True)
    (alone,) = [joined(complete(make("minigpt"), request))]
    others = complete(make("minigpt"), CompletionRequest(prompt="Or not", n=9, max_tokens=60))
    others.start(lambda _: None)
    assert joined(complete(make("minigpt"), request)) == alone
    others.cancel()
    make("minigpt").batcher.step()


def joined(deltas: Iterable[TextDelta]) -> TextDelta:
    return reduce(add, deltas)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": "caf\u00e9 \u4e2d"}, "prompt", "'\u00e9' '\u4e2d'"),
        ({"temperature": -1.0}, "temperature", "at least 0"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 3.5}, "max_tokens", "a whole number"),
        ({"max_tokens": True}, "max_tokens", "a whole number"),
        ({"max_tokens": 4000, "n": 64}, "max_tokens", "at most 256 with n = 64"),
        ({"temprature": 1.0}, "temprature", "did you mean 'temperature'"),
        ({"sed": 1}, "sed", "did you mean 'seed'"),
        ({"colour": "red"}, "colour", "max_tokens, min_p"),
    ],
)
def test_a_wrong_completion_names_the_field(make: Make, fields: dict[str, Any], param: str, says: str) -> None:
    error = request_error(lambda: complete(make("minigpt"), CompletionRequest(**{"prompt": "x", **fields})))
    assert (error.status, error.param) == (400, param)
    assert says in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": ["x", 3]},
        {"prompt": []},
        {"n": 0},
        {"n": 65},
        {"n": "2"},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": [""]},
        {"stop": ["a"] * 17},
    ],
)
def test_a_request_refuses_what_no_model_takes(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(**{"prompt": "x", **fields})


def test_null_means_not_given(make: Make) -> None:
    request = CompletionRequest.model_validate(
        {"prompt": "x", "n": None, "stop": None, "temperature": None, "top_k": None}
    )
    assert (request.n, request.stop, request.options) == (1, [], {})


# Images


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_row_i_depends_on_seed_and_i_alone(make: Make, family: str) -> None:
    few = answers.answer(make(family), GenerateRequest(n=2, seed=5))
    many = answers.answer(make(family), GenerateRequest(n=19, seed=5))
    assert many.images[:2] == few.images
    assert len(set(many.images)) == 19
    assert answers.answer(make(family), GenerateRequest(n=1, seed=6)).images[0] not in many.images
    assert Image.open(io.BytesIO(few.images[0])).size == (16, 16)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_generation_without_a_seed_tells_the_one_it_took(make: Make, family: str) -> None:
    first = answers.answer(make(family), GenerateRequest())
    assert first.seed is not None
    assert answers.answer(make(family), GenerateRequest(seed=first.seed)).images == first.images


def test_a_grid_is_one_picture(make: Make) -> None:
    answer = answers.answer(make("vae"), GenerateRequest(n=4, seed=1, grid=True))
    assert len(answer.images) == 1
    assert min(Image.open(io.BytesIO(answer.images[0])).size) > 2 * 16


def test_the_native_size_is_taken_and_no_other(make: Make) -> None:
    for size in ("auto", "16x16"):
        assert answers.answer(make("vae"), GenerateRequest(seed=1, size=size)).images
    error = request_error(lambda: answers.answer(make("vae"), GenerateRequest(size="1024x1024")))
    assert (error.status, error.param) == (400, "size")
    assert "'16x16'" in error.message


def test_encode_and_decode_make_a_reconstruction(make: Make) -> None:
    pixels = pictures(18)
    files = [base64.b64encode(png(image)).decode() for image in pixels]
    numbers = np.rint(pixels * 255) / 255
    model = make("vae")
    encoded = answers.answer(model, EncodeRequest(images=files))
    nested = answers.answer(model, EncodeRequest(images=[image[0].tolist() for image in numbers]))
    assert np.shape(encoded.latents) == (18, 4)
    assert np.allclose(encoded.latents, nested.latents, atol=1e-6)
    decoded = answers.answer(model, DecodeRequest(latents=list(encoded.latents)))
    assert decoded.images == answers.answer(model, ReconstructRequest(images=files)).images
    alone = answers.answer(model, EncodeRequest(images=files[17:]))
    assert alone.latents[0] == encoded.latents[17]


def test_what_was_encoded_is_what_the_family_says(make: Make) -> None:
    model, pixels = make("vae"), pictures(3)
    expected = model.family.encode(torch.from_numpy(pixels))
    answer = answers.answer(model, EncodeRequest(images=pixels.tolist()))
    assert torch.allclose(torch.tensor(answer.latents), expected, atol=1e-6)


def test_denoise_takes_and_gives_images(make: Make) -> None:
    answer = answers.answer(make("autoencoder"), DenoiseRequest(images=pictures(2).tolist()))
    assert [Image.open(io.BytesIO(file)).size for file in answer.images] == [(16, 16)] * 2


def test_interpolation_goes_from_any_end_to_any_end(make: Make) -> None:
    model = make("vae")
    picture = base64.b64encode(png(pictures(1)[0])).decode()
    latent = answers.answer(model, EncodeRequest(images=[picture])).latents[0]
    by_image = answers.answer(model, InterpolateRequest(start=3, end=f"data:image/png;base64,{picture}", steps=5))
    by_latent = answers.answer(model, InterpolateRequest(start=3, end=latent, steps=5))
    assert len(by_image.images) == 5
    assert by_image.images == by_latent.images
    assert by_latent.images[0] == answers.answer(model, GenerateRequest(seed=3)).images[0]
    strip = answers.answer(model, InterpolateRequest(start=3, end=4, steps=5, grid=True)).images[0]
    width, height = Image.open(io.BytesIO(strip)).size
    assert width > 4 * height


@pytest.mark.parametrize(
    ("request_", "param", "says"),
    [
        (EncodeRequest(images=["no base64!"]), "images[0]", "base64"),
        (EncodeRequest(images=[base64.b64encode(b"GIF89a" + b"x" * 50).decode()]), "images[0]", "PNG"),
        (
            EncodeRequest(images=[base64.b64encode(png(np.zeros((1, 28, 28)))).decode()]),
            "images[0]",
            "28 x 28, this model takes 16 x 16",
        ),
        (EncodeRequest(images=[[[0.5] * 16] * 15]), "images[0]", "15 x 16"),
        (EncodeRequest(images=[[[0.5] * 16] * 15 + [[0.5]]]), "images[0]", "16 x 16 numbers"),
        (EncodeRequest(images=[[[2.0] * 16] * 16]), "images[0]", "divide pixels by 255"),
        (EncodeRequest(images=[[[float("nan")] * 16] * 16]), "images[0]", "not finite"),
        (EncodeRequest(images=[[[10**400] * 16] * 16]), "images[0]", "16 x 16 numbers"),
        (EncodeRequest(images=[{"a": 1}]), "images[0]", "16 x 16 numbers"),
        (EncodeRequest(images=[None]), "images[0]", "16 x 16 numbers"),
        (DecodeRequest(latents=[[0.0] * 4, [0.0] * 3]), "latents[1]", "3 numbers, this model's latents have 4"),
        (DecodeRequest(latents=[[3e38] * 4]), "latents", "not finite"),
        (InterpolateRequest(start=1, end=-1), "end", "seed"),
        (InterpolateRequest(start=1, end=True), "end", "seed"),
        (InterpolateRequest(start=1, end=1.5), "end", "seed"),
        (InterpolateRequest(start=1, end=[]), "end", "16 x 16 numbers"),
        (InterpolateRequest(start=[0.0] * 5, end=1), "start", "5 numbers"),
        (GenerateRequest(temperature=-1.0), "temperature", "at least 0"),
        (GenerateRequest(temperatur=1.0), "temperatur", "did you mean 'temperature'"),
    ],
)
def test_a_wrong_image_request_names_the_field(make: Make, request_: ImageRequest, param: str, says: str) -> None:
    error = request_error(lambda: answers.answer(make("vae"), request_))
    assert (error.status, error.param) == (400, param)
    assert says in error.message


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GenerateRequest, {"n": 0}),
        (GenerateRequest, {"n": 65}),
        (EncodeRequest, {"images": []}),
        (EncodeRequest, {"images": [[0.0]] * 65}),
        (DecodeRequest, {"latents": [[0.0]] * 65}),
        (DecodeRequest, {"latents": [["0"]]}),
        (DecodeRequest, {"latents": [[1e300]]}),
        (DecodeRequest, {"latents": [[-(10**400)]]}),
        (InterpolateRequest, {"start": 1, "end": 2, "steps": 1}),
        (InterpolateRequest, {"start": 1, "end": 2, "steps": 65}),
        (InterpolateRequest, {"start": 1}),
    ],
)
def test_counts_are_limited_before_any_work(kind: type[ImageRequest], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**fields)


def test_a_model_says_which_verbs_it_has(make: Make) -> None:
    error = request_error(lambda: answers.answer(make("minigpt"), GenerateRequest()))
    assert isinstance(error, ModelNotFound)
    assert (error.status, error.message) == (404, "minigpt@1 (minigpt) has no 'generate'; it answers: complete")
    assert request_error(lambda: complete(make("vae"), CompletionRequest(prompt="x"))).status == 404
    assert "denoise" in request_error(lambda: answers.answer(make("vae"), DenoiseRequest(images=[[0.0]]))).message


@pytest.mark.skipif("gan" not in models.names(), reason="no family without an encoder")
def test_without_an_encoder_an_image_is_no_end(make: Make) -> None:
    request = InterpolateRequest(start=1, end=[[0.0] * 16] * 16)
    error = request_error(lambda: answers.answer(make("gan"), request))
    assert (error.param, "no encoder" in error.message) == ("end", True)


# Loading


@pytest.mark.parametrize("family", models.names())
def test_a_version_is_loaded_as_it_was_published(file_storage: Storage, family: str) -> None:
    version = publish(file_storage, "m", family)
    model = load(file_storage, of_version(Registry(file_storage), version))
    assert model.name == "m@1"
    assert isinstance(model, TextModel if family == "minigpt" else ImageModel)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "probe.safetensors", "assets/tokenizer.json"])
def test_a_damaged_version_is_not_loaded(file_storage: Storage, name: str) -> None:
    version = publish(file_storage, "m", "minigpt")
    key = f"models/m/blobs/{version.files[name].sha256}"
    content, _ = file_storage.get(key)
    file_storage.put(key, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        load(file_storage, of_version(Registry(file_storage), version))


def test_a_version_whose_outputs_differ_is_not_loaded(file_storage: Storage) -> None:
    one, two = (publish(file_storage, "m", "minigpt", step=step) for step in (1, 2))
    mixed = one.model_copy(update={"files": {**one.files, "probe.safetensors": two.files["probe.safetensors"]}})
    with pytest.raises(CheckpointError, match="differs"):
        load(file_storage, of_version(Registry(file_storage), mixed))


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (None, "missing"),
        (b"{", "damaged"),
        (b'{"type": "bpe"}', "bpe"),
        (b'{"type": "char", "vocab": "ab"}', "2 tokens"),
    ],
)
def test_a_text_model_needs_its_tokenizer(tmp_path: Path, tokenizer: bytes | None, says: str) -> None:
    loaded("minigpt", tmp_path)
    path = tmp_path / "assets" / "tokenizer.json"
    path.unlink() if tokenizer is None else path.write_bytes(tokenizer)
    with pytest.raises(CheckpointError, match=says):
        load_folder(tmp_path, "m@1")


def pictures(n: int) -> np.ndarray:
    """Return float32 (n, C, H, W) in [0, 1]."""
    return np.random.default_rng(0).random((n, *IMAGES.shape), dtype=np.float32)


def test_each_token_is_a_delta() -> None:
    deltas = iter(completion.complete(scripted("abc"), CompletionRequest(prompt="x", stop="cd", max_tokens=3)))
    assert [(delta.text, delta.tokens) for delta in deltas] == [("a", 1), ("b", 1), ("", 1), ("c", 0)]


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_a_request_switches_no_module_between_training_and_evaluation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each switch visits every module of a network, for each batch of each request."""
    model, switched = loaded(name, tmp_path), list[bool]()
    monkeypatch.setattr(torch.nn.Module, "train", lambda module, mode=True: switched.append(mode))
    answers.answer(model, GenerateRequest(n=3, seed=1))
    assert switched == []
