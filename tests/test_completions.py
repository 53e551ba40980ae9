"""What a completion tells beside its text: log-probabilities, prompt, the best of several; to OpenAI's client too."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from asking import ask
from published import VOCABULARY, loaded, publish
from served import served

from genmodels.engine.loaded import TextModel
from genmodels.engine.text import CompletionRequest, Piece, TokenLogprob, complete
from genmodels.errors import RequestError
from genmodels.storage import open_storage
from services.host import ModelHost
from services.routes import create_app

PROMPT = "To be"


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    model = loaded("minigpt", tmp_path_factory.mktemp("play"))
    assert isinstance(model, TextModel)
    return model


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt")
    return create_app(ModelHost(storage.url))


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with served(app) as url:
        yield url


def written(model: TextModel, **fields: Any) -> list[Piece]:
    """Each choice as one piece."""
    request = CompletionRequest.model_validate({"prompt": PROMPT, "seed": 1, "max_tokens": 8, **fields})
    choices: dict[int, Piece] = {}
    for piece in complete(model, request):
        choices[piece.index] = choices[piece.index] + piece if piece.index in choices else piece
    return [choices[index] for index in sorted(choices)]


def expected_logprobs(model: TextModel, text: str, top: int) -> list[TokenLogprob]:
    """The plain way: each prefix through the network, on its own."""
    tokens, found = model.tokenizer.encode(text), []
    for at, token in enumerate(tokens):
        if at == 0:
            found.append(TokenLogprob(text[0], 0, None, None))
            continue
        logprobs = model.family.logits(torch.tensor([tokens[:at]]))[0, -1].double().log_softmax(-1)
        values, best = logprobs.topk(top)
        tops = {VOCABULARY[other]: value for other, value in zip(best.tolist(), values.tolist(), strict=True)}
        found.append(TokenLogprob(text[at], at, float(logprobs[token]), tops))
    return found


def is_close(one: TokenLogprob, other: TokenLogprob) -> bool:
    return (
        (one.token, one.offset) == (other.token, other.offset)
        and one.logprob == pytest.approx(other.logprob, abs=1e-5)
        and one.top == (None if other.top is None else pytest.approx(other.top, abs=1e-5))
    )


def test_logprobs_are_those_of_the_network_whatever_the_settings(play: TextModel) -> None:
    (choice,) = written(play, echo=True, logprobs=3, temperature=1.5, top_k=5, presence_penalty=1.0)
    assert choice.text.startswith(PROMPT)
    assert len(choice.text) == len(choice.logprobs) == 13
    expected = expected_logprobs(play, choice.text, 3)
    assert all(is_close(*pair) for pair in zip(choice.logprobs, expected, strict=True))


def test_an_echo_reads_the_prompt_alone_where_nothing_is_to_be_written(play: TextModel) -> None:
    for prompt in ("x", PROMPT, "To be or not to be"[:16]):
        (choice,) = written(play, prompt=prompt, echo=True, logprobs=2, max_tokens=0)
        assert (choice.text, choice.tokens, choice.finish_reason) == (prompt, 0, "length")
        expected = expected_logprobs(play, prompt, 2)
        assert all(is_close(*pair) for pair in zip(choice.logprobs, expected, strict=True))


def test_what_is_out_of_the_window_has_no_logprob(play: TextModel) -> None:
    prompt = "To be or not to be, that is"  # 27 characters; the window is 16, and begins again with its half
    (choice,) = written(play, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    assert [token.logprob is None for token in choice.logprobs] == [True] * 20 + [False] * 7
    inside = expected_logprobs(play, prompt[-8:], 1)
    assert [token.logprob for token in choice.logprobs[20:]] == pytest.approx([one.logprob for one in inside[1:]])


def test_logprobs_change_no_text_and_end_where_a_stop_string_begins(play: TextModel) -> None:
    (plain,) = written(play, max_tokens=12)
    (told,) = written(play, max_tokens=12, logprobs=0)
    assert told.text == plain.text
    assert "".join(token.token for token in told.logprobs) == plain.text
    assert [token.offset for token in told.logprobs] == list(range(12))
    stop = plain.text[5:8]
    (cut,) = written(play, max_tokens=12, logprobs=0, stop=stop)
    assert cut.finish_reason == "stop"
    assert "".join(token.token for token in cut.logprobs) == cut.text == plain.text[: plain.text.index(stop)]


def test_one_text_that_goes_wrong_ends_alone(play: TextModel) -> None:
    arrived: dict[str, list[Any]] = {"good": [], "bad": []}
    asked = CompletionRequest.model_validate({"prompt": PROMPT, "seed": 1, "max_tokens": 8})
    good, bad = complete(play, asked), complete(play, asked)
    (text,) = bad._texts
    text.take = lambda token, logits: 1 / 0  # type: ignore[assignment, return-value]
    bad.start(arrived["bad"].append)
    good.start(arrived["good"].append)
    while play.batcher.step():
        pass
    assert isinstance(arrived["bad"][0], ZeroDivisionError)
    assert "".join(piece.text for piece in arrived["good"]) == written(play)[0].text


def test_an_output_that_is_not_finite_ends_its_text_and_spoils_no_later_one(
    play: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(play)
    decoder = play.batcher._decoder
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda *arguments: prefill(*arguments) * math.nan)
    with pytest.raises(RequestError, match="not finite"):
        written(play)
    monkeypatch.undo()
    with torch.inference_mode():
        for layer in decoder._layers:
            layer._kept.fill_(math.nan)
    assert written(play) == before


def test_the_best_of_several(app: Any) -> None:
    body = {"model": "play", "prompt": PROMPT, "max_tokens": 6, "seed": 5, "logprobs": 0}
    every = ask(app, "POST", "/v1/completions", {**body, "n": 6}).json()
    means = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / 6 for choice in every["choices"]}
    best = sorted(means, key=lambda text: means[text], reverse=True)[:2]
    found = ask(app, "POST", "/v1/completions", {**body, "n": 2, "best_of": 6}).json()
    assert [choice["text"] for choice in found["choices"]] == best
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert found["usage"] == every["usage"]


def test_settings_of_openai_reach_the_sampler(app: Any) -> None:
    body = {"model": "play", "prompt": PROMPT, "max_tokens": 12, "seed": 5}
    liked = VOCABULARY.index("Q")
    biased = ask(app, "POST", "/v1/completions", {**body, "logit_bias": {str(liked): 100}}).json()
    assert biased["choices"][0]["text"] == "Q" * 12
    fields = {
        "logit_bias": {str(liked): 100, "3": 100},
        "frequency_penalty": 2,
        "presence_penalty": 2,
        "temperature": 0,
    }
    punished = ask(app, "POST", "/v1/completions", {**body, **fields}).json()["choices"][0]["text"]
    assert sorted(punished) == sorted([VOCABULARY[3], "Q"] * 6)


def test_openais_client(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    whole = client.completions.create(
        model="play", prompt=PROMPT, max_tokens=9, seed=2, n=2, best_of=2, echo=True, logprobs=2
    )
    first = whole.choices[0]
    assert first.text.startswith(PROMPT)
    assert first.logprobs is not None
    assert first.logprobs.tokens == list(first.text)
    assert first.logprobs.text_offset == list(range(14))
    assert first.logprobs.top_logprobs is not None
    assert len(first.logprobs.top_logprobs[-1]) == 2
    stream = client.completions.create(
        model="play", prompt=PROMPT, max_tokens=9, seed=2, n=2, echo=True, logprobs=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        told = [part.logprobs for part in parts if part.logprobs]
        assert choice.logprobs is not None
        assert [value for part in told for value in part.token_logprobs or []] == choice.logprobs.token_logprobs
        assert [value for part in told for value in part.text_offset or []] == choice.logprobs.text_offset
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="at most 5"):
        client.completions.create(model="play", prompt=PROMPT, logprobs=6)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt=PROMPT)


def test_curl_sees_a_stream_that_ends(url: str, tmp_path: Path) -> None:
    body = {"model": "play", "prompt": PROMPT, "max_tokens": 9, "seed": 2, "stream": True}
    command = ["curl", "-sN", f"{url}/v1/completions", "-H", "content-type: application/json", "-d", json.dumps(body)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
    whole = ask_whole(url, body)
    assert "".join(parts) == whole


def ask_whole(url: str, body: dict[str, Any]) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    return client.completions.create(**{**body, "stream": False}).choices[0].text
