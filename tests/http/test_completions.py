"""Test `POST /v1/completions` in OpenAI's format: whole and streamed, by plain HTTP, by OpenAI's client and by curl."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.request import CompletionRequest
from genmodels.errors import RequestError
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import CompletionStarted, ModelHost
from services.gateway.routes import create_app
from tests.support.asgi_client import ask, refused
from tests.support.asgi_server import served
from tests.support.event_streams import events, joined, until
from tests.support.published_models import VOCABULARY, publish
from tests.support.scripted_pool import ScriptedPool

PROMPT = {"model": "play", "prompt": "To be", "seed": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt")
    return storage


@pytest.fixture(scope="module")
def app(models: Storage) -> Any:
    return create_app(ModelHost(models.url))


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def answer_of(app: Any, **fields: Any) -> dict[str, Any]:
    response = ask(app, "POST", "/v1/completions", {**PROMPT, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def choice_of(app: Any, **fields: Any) -> dict[str, Any]:
    return answer_of(app, **fields)["choices"][0]


def streamed(app: Any, **fields: Any) -> list[Any]:
    return events(ask(app, "POST", "/v1/completions", {**PROMPT, "stream": True, **fields}).text)


# Whole answers


def test_a_completion(app: Any) -> None:
    body = {**PROMPT, "max_tokens": 12, "n": 2, "user": "me", "echo": False, "logprobs": None, "suffix": ""}
    response = ask(app, "POST", "/v1/completions", body)
    answer = response.json()
    assert response.headers["x-genmodels-version"] == "play@1"
    assert answer["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", "play@1", 3)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}
    assert [(choice["index"], len(choice["text"]), choice["finish_reason"]) for choice in answer["choices"]] == [
        (0, 12, "length"),
        (1, 12, "length"),
    ]
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert ask(app, "POST", "/v1/completions", body).json()["choices"] == answer["choices"]


def test_a_stop_string_is_cut_off_and_its_log_probabilities_with_it(app: Any) -> None:
    whole = choice_of(app, max_tokens=100, logprobs=1)
    stop = whole["text"][5:8]
    choice = choice_of(app, max_tokens=100, logprobs=1, stop=stop)
    shown = whole["text"].index(stop)
    assert (choice["text"], choice["finish_reason"]) == (whole["text"][:shown], "stop")
    assert choice["logprobs"] == {name: values[:shown] for name, values in whole["logprobs"].items()}


def test_log_probabilities_are_of_the_model_itself(app: Any) -> None:
    choice = choice_of(app, max_tokens=20, logprobs=5, temperature=1.7, presence_penalty=1, logit_bias={"3": 4})
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == list(range(20))
    for token, logprob, top in zip(*(logprobs[name] for name in list(logprobs)[:3]), strict=True):
        assert top[token] == logprob < 0
        assert len(top) == (5 if logprob >= sorted(top.values())[-5] else 6)
        assert list(top.values())[:5] == sorted(list(top.values())[:5], reverse=True)
    forced = choice_of(app, max_tokens=1, logprobs=5, logit_bias={"7": 100})  # logprobs are without the bias
    assert forced["text"] == VOCABULARY[7]
    assert forced["logprobs"]["token_logprobs"][0] < math.log(0.5)
    assert choice_of(app, max_tokens=1, logprobs=0)["logprobs"]["top_logprobs"][0].keys() == set(
        choice_of(app, max_tokens=1)["text"]
    )


def test_echo_puts_the_prompt_before_the_answer(app: Any) -> None:
    plain = answer_of(app, max_tokens=9, n=2, logprobs=2)
    echoed = answer_of(app, max_tokens=9, n=2, logprobs=2, echo=True)
    assert echoed["usage"] == plain["usage"]
    for with_prompt, without in zip(echoed["choices"], plain["choices"], strict=True):
        assert with_prompt["text"] == "To be" + without["text"]
        actual, expected = with_prompt["logprobs"], without["logprobs"]
        assert "".join(actual["tokens"]) == with_prompt["text"]
        assert actual["text_offset"] == list(range(14))
        assert actual["token_logprobs"][5:] == expected["token_logprobs"]
        assert actual["top_logprobs"][5:] == expected["top_logprobs"]
        assert (actual["token_logprobs"][0], actual["top_logprobs"][0]) == (None, None)
        assert all(logprob < 0 for logprob in actual["token_logprobs"][1:])


def test_a_prompt_can_be_measured_alone(app: Any) -> None:
    answer = answer_of(app, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("To be", "length")
    longer = choice_of(app, max_tokens=3, echo=True, logprobs=0)["logprobs"]
    assert choice["logprobs"] == {name: values[:5] for name, values in longer.items()}
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    one = choice_of(app, prompt="T", max_tokens=0, echo=True, logprobs=3)
    assert one["logprobs"] == {"tokens": ["T"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    assert choice_of(app, max_tokens=0, echo=True)["text"] == "To be"


def test_the_best_of_many_are_those_of_the_most_probable_tokens(app: Any) -> None:
    many = answer_of(app, max_tokens=15, n=6, logprobs=0, temperature=2)
    means = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])
        for choice in many["choices"]
    }
    best = answer_of(app, max_tokens=15, n=2, best_of=6, temperature=2)
    assert [choice["text"] for choice in best["choices"]] == sorted(means, key=means.__getitem__, reverse=True)[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"] == many["usage"]  # discarded tokens count too
    same = answer_of(app, max_tokens=15, n=6, best_of=6, logprobs=0, temperature=2)
    assert same["choices"] == many["choices"]


def test_penalties_and_biases_arrive(app: Any) -> None:
    banned = {str(token): -100 for token in range(len(VOCABULARY)) if token != 11}
    assert choice_of(app, max_tokens=8, logit_bias=banned)["text"] == VOCABULARY[11] * 8
    greedy = {"temperature": 0, "max_tokens": 30}
    plain = choice_of(app, **greedy)["text"]
    for name in ("presence_penalty", "frequency_penalty"):
        assert len(set(choice_of(app, **greedy, **{name: 2})["text"])) > len(set(plain))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": "caf\u00e9"}, "prompt", "\u00e9"),
        ({"prompt": {"text": "To be"}}, "prompt", "expected text"),
        ({"prompt": None}, "prompt", "missing"),
        ({"model": 3}, "model", "expected text"),
        ({"model": None}, "model", "missing"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 65}, "n", "at most 64"),
        ({"n": 1.5}, "n", "a whole number"),
        ({"seed": "1"}, "seed", "a whole number"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"max_tokens": 10**9}, "max_tokens", "at most"),
        ({"max_tokens": 0}, "max_tokens", "at least 1; 0 is allowed only with echo"),
        ({"max_tokens": 4096, "n": 64}, "max_tokens", "at most 256 with n = 64"),
        ({"max_tokens": 256, "n": 64, "echo": True}, "max_tokens", "at most 251 with n = 64 and 5 tokens to echo"),
        (
            {"prompt": "x" * 300, "n": 64, "echo": True},
            "echo",
            "prompts of 300 tokens, expected at most 256 to",
        ),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"echo": 1}, "echo", "true or false"),
        ({"n": 3, "best_of": 2}, "best_of", "got 2, expected at least n, which is 3"),
        ({"best_of": 65}, "best_of", "at most 64"),
        ({"logprobs": 6}, "logprobs", "at most 5"),
        ({"logprobs": True}, "logprobs", "a whole number"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "got the key 'a', expected the id of a token"),
        ({"logit_bias": {"01": 1}}, "logit_bias", "'01'"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1]", "at most 100"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "token 999 does not exist"),
        ({"logit_bias": [1]}, "logit_bias", "a mapping"),
        ({"messages": []}, "messages", "unknown key"),
        ({"options": {}}, "options", "unknown key"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "unknown key"),
        ({"prompt": "x" * 65_537}, "prompt", "at most 65536"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_completion_is_400_and_names_the_field(
    app: Any, fields: dict[str, Any], param: str, says: str, stream: bool
) -> None:
    body = {"model": "play", "prompt": "To be", "max_tokens": 2, "stream": stream, **fields}
    error = refused(ask(app, "POST", "/v1/completions", body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]


def test_texts_that_are_thrown_away_count_too(app: Any) -> None:
    body = {**PROMPT, "max_tokens": 257, "best_of": 64}
    assert "at most 256 with best_of = 64" in refused(ask(app, "POST", "/v1/completions", body), 400)["message"]
    body = {**PROMPT, "best_of": 2, "stream": True}
    assert refused(ask(app, "POST", "/v1/completions", body), 400)["param"] == "stream"


# Streams


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 0, "best_of": 2}])
def test_a_stream_is_the_same_answer_in_parts(app: Any, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 40, "n": 2, **fields}
    text = choice_of(app, **fields)["text"]
    fields["stop"] = text[30:33]
    whole = answer_of(app, **fields)
    *chunks, usage, done = streamed(app, **fields, stream_options={"include_usage": True})
    assert done == "data: [DONE]"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert [joined(chunks, choice["index"]) for choice in whole["choices"]] == whole["choices"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    assert all("usage" not in chunk for chunk in streamed(app, **fields)[:-1])


def test_a_stream_s_headers(app: Any) -> None:
    response = ask(app, "POST", "/v1/completions", {**PROMPT, "stream": True, "max_tokens": 1})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-genmodels-version"] == "play@1"
    assert events(response.text)[0]["id"] == f"cmpl-{response.headers['x-request-id']}"


# Faults of a pool


OPENED, PIECE = CompletionStarted("m@1", "minigpt", 1, 1), TextDelta(0, "abc", 3)
BODY = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ([RequestError("host lost", status=503, code="host_lost")], "host_lost"),
        ([], "host_lost"),
        ([ValueError("internal detail")], None),
    ],
)
def test_an_answer_cut_off_never_looks_whole(ending: list[Any], code: str | None) -> None:
    app = create_app(ScriptedPool(OPENED, PIECE, *ending))
    first, last = events(ask(app, "POST", "/v1/completions", {**BODY, "stream": True}).text)
    assert first["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": None}]
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", code)
    error = refused(ask(app, "POST", "/v1/completions", BODY), 503 if code else 500)
    assert "internal detail" not in error["message"]


def test_a_second_choice_that_never_comes_is_missed() -> None:
    app = create_app(ScriptedPool(OPENED, TextDelta(0, "abc", 3, "length")))
    assert refused(ask(app, "POST", "/v1/completions", {**BODY, "n": 2}), 503)
    assert "error" in events(ask(app, "POST", "/v1/completions", {**BODY, "n": 2, "stream": True}).text)[-1]


def test_a_full_pool_is_429_with_retry_after() -> None:
    app = create_app(ScriptedPool(RequestError("full", status=429, code="too_many_requests")))
    for stream in (False, True):
        response = ask(app, "POST", "/v1/completions", {**BODY, "stream": stream})
        assert (refused(response, 429)["type"], response.headers["retry-after"]) == ("rate_limit_error", "1")


# Clients that disconnect


def test_a_client_that_leaves_frees_its_slot_within_a_step(models: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost(models.url, workers=1, pin=["play"])
    batcher = host._cache._entries["play@1"].model.batcher  # type: ignore[attr-defined]
    step, allowed = batcher.step, threading.Semaphore(0)

    def watched() -> bool:
        allowed.acquire()
        return step()

    monkeypatch.setattr(batcher, "step", watched)

    async def leave() -> None:
        items = host.complete("play", CompletionRequest.model_validate({"prompt": "x", "max_tokens": 4096}))
        assert isinstance(await anext(items), CompletionStarted)
        allowed.release()
        assert isinstance(await anext(items), TextDelta)
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await items.aclose()

    asyncio.run(leave())
    assert batcher.busy
    allowed.release()
    until(lambda: not batcher.busy)


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_closes_frees_its_slots(
    models: Storage, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    host = ModelHost(models.url, pin=["play"])
    batcher = host._cache._entries["play@1"].model.batcher  # type: ignore[attr-defined]
    step, steps = batcher.step, []

    def watched() -> bool:
        steps.append(len(batcher._running()))
        time.sleep(0.005)  # so that the response never ends before the client disconnects
        return step()

    monkeypatch.setattr(batcher, "step", watched)
    body = {**PROMPT, "max_tokens": 4096, "n": 2, "stream": stream}
    with served(create_app(host)) as url, httpx.Client(base_url=url, timeout=60) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_text())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
        until(lambda: not batcher.busy)
    assert 2 in steps
    assert len(steps) < 4000


# OpenAI's client, and curl


def test_openai_s_client_reads_whole_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="play", prompt="To be", max_tokens=10, n=2, best_of=3, seed=5, logprobs=3, echo=True, logit_bias={"5": 1}
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 30)
    for index, choice in enumerate(answer.choices):
        assert (choice.index, choice.finish_reason, choice.text[:5]) == (index, "length", "To be")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.token_logprobs is not None
        assert "".join(choice.logprobs.tokens) == choice.text
        assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset or []) == 15
    whole = answer.choices[0].text.removeprefix("To be")
    cut = client.completions.create(model="play", prompt="To be", max_tokens=10, seed=5, logit_bias={"5": 1})
    stopped = client.completions.create(
        model="play", prompt="To be", max_tokens=10, seed=5, logit_bias={"5": 1}, stop=[cut.choices[0].text[4:6]]
    )
    assert (len(whole), stopped.choices[0].finish_reason) == (10, "stop")
    assert cut.choices[0].text.startswith(stopped.choices[0].text)


def test_openai_s_client_reads_streams(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "play", "prompt": "To be", "max_tokens": 40, "seed": 5, "logprobs": 1}
    whole = client.completions.create(**fields)
    *chunks, last = client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert whole.choices[0].logprobs is not None
    tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert (last.choices, last.usage) == ([], whole.usage)


def test_openai_s_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="play", prompt="x", max_tokens=-1)
    assert (error.value.param, error.value.code, error.value.type) == (
        "max_tokens",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="none", prompt="x", stream=True)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    full = RequestError("full", status=429, code="queue_full")
    cut = ScriptedPool(OPENED, PIECE, RequestError("gone", status=503, code="host_lost"))
    with served(create_app(ScriptedPool(full))) as url, pytest.raises(openai.RateLimitError):
        client.with_options(base_url=f"{url}/v1").completions.create(model="play", prompt="x")
    with served(create_app(cut)) as url:
        chunks = client.with_options(base_url=f"{url}/v1").completions.create(model="m", prompt="x", stream=True)
        assert next(chunks).choices[0].text == "abc"
        with pytest.raises(openai.APIError, match="gone"):
            next(chunks)


def test_curl_shows_a_stream_as_it_comes(url: str, app: Any) -> None:
    body = json.dumps({**PROMPT, "max_tokens": 600, "stream": True})
    curl = subprocess.run(
        ["curl", "-sN", f"{url}/v1/completions", "-H", "content-type: application/json", "-d", body],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *chunks, done = events(curl.stdout)
    assert done == "data: [DONE]"
    assert joined(chunks, 0)["text"] == choice_of(app, max_tokens=600)["text"]
    assert len(chunks) > 1
