"""Test `prompt` in all forms of OpenAI's API: one text, several texts, token ids, several lists of token ids."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.data.text import CharTokenizer
from genmodels.engine.text.completion import MAX_CANDIDATES, MAX_TOKENS
from genmodels.engine.text.request import CompletionRequest
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import CompletionStarted, ModelHost
from services.gateway.routes import create_app
from tests.support.asgi_client import ask, refused
from tests.support.event_streams import events, joined, until
from tests.support.published_models import VOCABULARY, publish

TOKENIZER = CharTokenizer(VOCABULARY)
PROMPTS = ["To be", "Or not!", "x", "A long one, so that the window of sixteen tokens is too small for it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt")
    publish(storage, "shapes", "vae")
    return storage


@pytest.fixture(scope="module")
def host(models: Storage) -> ModelHost:
    return ModelHost(models.url, pin=["play"])


@pytest.fixture(scope="module")
def app(host: ModelHost) -> Any:
    return create_app(host)


def send(app: Any, **fields: Any) -> Any:
    return ask(app, "POST", "/v1/completions", {"model": "play", "max_tokens": 6, **fields})


def answer_of(app: Any, **fields: Any) -> dict[str, Any]:
    response = send(app, **fields)
    assert response.status_code == 200, response.text
    return response.json()


FORMS = {
    "text": lambda prompt: prompt,
    "tokens": TOKENIZER.encode,
    "mixed": lambda prompt: prompt if len(prompt) % 2 else TOKENIZER.encode(prompt),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"n": 2, "best_of": 4, "temperature": 2},
    {"n": 2, "echo": True, "logprobs": 3},
    {"best_of": 3, "echo": True, "logprobs": 0},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"n": 2, "stop": ["a", "b", "e", "th"], "logprobs": 1, "temperature": 1.5},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_each_prompt_is_answered_as_if_it_were_alone(app: Any, form: str, fields: dict[str, Any]) -> None:
    """Choice j of prompt i has the index i * n + j; usage counts all of them."""
    alone = [answer_of(app, prompt=prompt, seed=7, **fields) for prompt in PROMPTS]
    together = answer_of(app, prompt=[FORMS[form](prompt) for prompt in PROMPTS], seed=7, **fields)
    assert [choice.pop("index") for choice in together["choices"]] == list(range(len(PROMPTS) * fields.get("n", 1)))
    expected = [choice for one in alone for choice in one["choices"]]
    for choice in expected:
        del choice["index"]
    assert together["choices"] == expected
    assert together["usage"] == {name: sum(one["usage"][name] for one in alone) for name in together["usage"]}
    assert together["seed"] == 7


@pytest.mark.parametrize("fields", [{}, {"n": 3, "logprobs": 2, "echo": True}, {"n": 2, "stop": ["e", "o"]}], ids=str)
def test_a_stream_of_several_prompts_is_the_same_answer_in_parts(app: Any, fields: dict[str, Any]) -> None:
    fields = {"prompt": PROMPTS, "seed": 3, "max_tokens": 30, **fields}
    whole = answer_of(app, **fields)
    text = send(app, **fields, stream=True, stream_options={"include_usage": True}).text
    *chunks, usage, done = events(text)
    assert done == "data: [DONE]"
    assert [joined(chunks, choice["index"]) for choice in whole["choices"]] == whole["choices"]
    assert usage["usage"] == whole["usage"]


def test_one_list_of_token_ids_is_one_prompt(app: Any) -> None:
    text, tokens = answer_of(app, prompt="To be", seed=1), answer_of(app, prompt=TOKENIZER.encode("To be"), seed=1)
    assert tokens["choices"] == text["choices"]
    assert tokens["usage"] == text["usage"]
    assert answer_of(app, prompt=["To be"], seed=1)["choices"] == text["choices"]
    assert answer_of(app, prompt=[TOKENIZER.encode("To be")], seed=1)["choices"] == text["choices"]


# Seeds


def test_prompts_without_a_seed_get_one_each_and_the_answer_has_them(app: Any) -> None:
    fields = {"prompt": ["To be"] * 4, "max_tokens": 30, "temperature": 2, "n": 2}
    first = answer_of(app, **fields)
    assert len(set(first["seed"])) == 4
    assert len({choice["text"] for choice in first["choices"]}) == 8
    assert answer_of(app, **fields, seed=first["seed"])["choices"] == first["choices"]
    for place, seed in enumerate(first["seed"]):
        one = answer_of(app, **{**fields, "prompt": "To be"}, seed=seed)["choices"]
        assert [choice["text"] for choice in one] == [
            choice["text"] for choice in first["choices"][2 * place : 2 * place + 2]
        ]


def test_the_same_seed_gives_the_same_prompt_the_same_answer_in_any_place(app: Any) -> None:
    answers = answer_of(app, prompt=["x", "To be", "x"], seed=0, temperature=2, max_tokens=30)
    assert answers["choices"][0]["text"] == answers["choices"][2]["text"]
    assert answers["seed"] == 0


# All or nothing


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "0 entries, expected at least 1"),
    ({"prompt": [[]]}, "prompt[0]", "0 entries, expected at least 1"),
    ({"prompt": ["x", ""]}, "prompt[1]", "0 characters, expected at least 1"),
    ({"prompt": ["x", []]}, "prompt[1]", "0 entries, expected at least 1"),
    ({"prompt": ["x", 3]}, "prompt[1]", "got 3, expected text"),
    ({"prompt": ["x", None]}, "prompt[1]", "got nothing, expected text"),
    ({"prompt": [1, "x"]}, "prompt[1]", "got 'x', expected a whole number"),
    ({"prompt": [1, [2]]}, "prompt[1]", "got a list, expected a whole number"),
    ({"prompt": [[1], [[2]]]}, "prompt[1][0]", "got a list, expected a whole number"),
    ({"prompt": [[1, True]]}, "prompt[0][1]", "got true, expected a whole number"),
    ({"prompt": [1, 2.5]}, "prompt[1]", "got 2.5, expected a whole number"),
    ({"prompt": [1, -1]}, "prompt[1]", "got -1"),
    ({"prompt": [{"text": "x"}]}, "prompt[0]", "got a mapping"),
    ({"prompt": 3}, "prompt", "got 3, expected text"),
    ({"prompt": ["x"] * 65}, "prompt", "at most 64"),
    ({"prompt": ["x" * 40_000, [0] * 40_000]}, "prompt", "got 80000 characters and token ids in all prompts"),
    ({"prompt": [0] * 65_537}, "prompt", "at most 65536"),
    ({"prompt": [3, 58]}, "prompt[1]", "token 58 does not exist; this model's are 0 to 57"),
    ({"prompt": [[3], [0, 2**31 - 1]]}, "prompt[1][1]", "token 2147483647 does not exist"),
    ({"prompt": [[3], [0, 2**70]]}, "prompt[1][1]", "expected a whole number less than 2147483648"),
    ({"prompt": ["x", "caf\u00e9"]}, "prompt[1]", "never seen: '\u00e9'"),
    ({"prompt": ["x"] * 20, "n": 7}, "prompt", "got 20 prompts, expected at most 18 with n = 7"),
    ({"prompt": ["x"] * 3, "best_of": 64}, "prompt", "got 3 prompts, expected at most 2 with best_of = 64"),
    ({"prompt": ["x"] * 64, "max_tokens": 300}, "max_tokens", "at most 256 with n = 1 and 64 prompts"),
    ({"prompt": ["xy"] * 64, "max_tokens": 255, "echo": True}, "max_tokens", "at most 254 with n = 1 and 64 prompts"),
    ({"prompt": ["x" * 300] * 64, "echo": True}, "echo", "prompts of 19200 tokens, expected at most 16384 to echo"),
    ({"prompt": ["x"] * 3, "seed": [1, 2]}, "seed", "got 2 seeds, expected one, or one for each prompt: 3"),
    ({"prompt": "x", "seed": [1, 2]}, "seed", "one for each prompt: 1"),
    ({"prompt": ["x"], "seed": []}, "seed", "0 entries, expected at least 1"),
    ({"prompt": ["x"], "seed": [-1]}, "seed[0]", "got -1"),
    ({"prompt": ["x"], "seed": "1"}, "seed", "got '1', expected a whole number"),
    ({"prompt": ["x", "y"], "best_of": 2, "stream": True}, "stream", "cannot be streamed"),
]


@pytest.mark.parametrize(("fields", "param", "says"), WRONG, ids=[str(one[0])[:60] for one in WRONG])
def test_one_wrong_prompt_refuses_all_before_any_work(
    app: Any, host: ModelHost, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str, says: str
) -> None:
    batcher = host._cache._entries["play@1"].model.batcher  # type: ignore[attr-defined]
    monkeypatch.setattr(batcher, "add", lambda *texts: pytest.fail("work has begun"))
    error = refused(send(app, **fields), 400)
    assert (error["param"], error["message"].startswith(param)) == (param, True)
    assert says in error["message"]
    assert error["message"].count("got ") <= 1  # one problem, not one for each possible form


def test_the_most_that_is_taken_fits_an_engine_with_nothing_else_to_do(app: Any) -> None:
    answer = answer_of(app, prompt=["x"] * 64, n=2, max_tokens=1)
    assert len(answer["choices"]) == MAX_CANDIDATES
    assert answer_of(app, prompt=["x"] * 2, best_of=64, max_tokens=1)["usage"]["completion_tokens"] == MAX_CANDIDATES
    assert MAX_TOKENS // MAX_CANDIDATES == 128
    assert refused(send(app, prompt=["x"] * 64, n=2, max_tokens=129), 400)["param"] == "max_tokens"


PROMPT = st.text(VOCABULARY, min_size=1, max_size=40)
ONE = st.one_of(PROMPT, PROMPT.map(TOKENIZER.encode))


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(ONE, min_size=1, max_size=5), n=st.integers(1, 3), extra=st.integers(0, 2), data=st.data())
def test_any_prompts_in_any_company_have_the_answers_that_they_have_alone(
    app: Any, prompts: list[Any], n: int, extra: int, data: st.DataObject
) -> None:
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=len(prompts), max_size=len(prompts)))
    fields: dict[str, Any] = {"n": n, "best_of": n + extra, "logprobs": 1, "max_tokens": 9}
    together = answer_of(app, prompt=prompts, seed=seeds, **fields)["choices"]
    for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = answer_of(app, prompt=prompt, seed=seed, **fields)["choices"]
        own = together[place * n : (place + 1) * n]
        assert [{**choice, "index": choice["index"] + place * n} for choice in alone] == own


# Clients that disconnect


def test_a_client_that_leaves_ends_the_texts_of_all_its_prompts(models: Storage) -> None:
    host = ModelHost(models.url, pin=["play"])
    batcher = host._cache._entries["play@1"].model.batcher  # type: ignore[attr-defined]
    request = CompletionRequest.model_validate({"prompt": PROMPTS * 5, "n": 2, "max_tokens": 400})

    async def leave() -> None:
        items = host.complete("play", request)
        assert isinstance(await anext(items), CompletionStarted)
        assert len(batcher._waiting) + len(batcher._running()) == 40
        await items.aclose()

    asyncio.run(leave())
    until(lambda: not batcher.busy)


# Line ends


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_are_those_of_the_training_text(app: Any, end: str) -> None:
    unix, other = "To be\n\nOr not\n", f"To be{end}{end}Or not{end}"
    fields: dict[str, Any] = {"seed": 2, "echo": True, "logprobs": 0, "max_tokens": 40, "logit_bias": {"0": 3}}
    expected = answer_of(app, prompt=unix, **fields)
    assert "\n" in expected["choices"][0]["text"].removeprefix(unix)
    for prompt in (other, [other]):
        answer = answer_of(app, prompt=prompt, **fields)
        assert (answer["choices"], answer["usage"]) == (expected["choices"], expected["usage"])
    stopped = [answer_of(app, prompt=unix, **fields, stop=stop)["choices"] for stop in ("\n", end, [end + "x", end])]
    assert stopped[0][0]["finish_reason"] == "stop"
    assert stopped[0] == stopped[1] == stopped[2]


def test_a_model_that_has_learnt_carriage_returns_keeps_them() -> None:
    tokenizer = CharTokenizer("\n\rab")
    assert tokenizer.encode("a\r\nb\r") == [2, 1, 0, 3, 1]
    assert tokenizer.normalize("\r\n") == "\r\n"


# The vocabulary


def test_the_vocabulary_tells_what_token_ids_mean(app: Any) -> None:
    response = ask(app, "GET", "/v1/models/play/vocabulary")
    listing = response.json()
    assert (listing["object"], listing["model"]) == ("vocabulary", response.headers["x-genmodels-version"])
    ids = {token["text"]: token["id"] for token in listing["data"]}
    assert len(ids) == len(listing["data"]) == ask(app, "GET", "/v1/models/play").json()["vocab_size"]
    prompt = [ids[character] for character in "To be"]
    assert answer_of(app, prompt=prompt, echo=True, max_tokens=0)["choices"][0]["text"] == "To be"
    answer = answer_of(app, prompt="x", logit_bias={ids["Q"]: 100}, max_tokens=3)
    assert answer["choices"][0]["text"] == "QQQ"


def test_what_has_no_vocabulary_says_what_it_answers(app: Any) -> None:
    error = refused(ask(app, "GET", "/v1/models/shapes/vocabulary"), 404)
    assert (error["code"], "it answers: decode, encode" in error["message"]) == ("verb_not_supported", True)
    assert refused(ask(app, "GET", "/v1/models/none/vocabulary"), 404)["code"] == "model_not_found"


# Additional fields of clients


NEUTRAL: dict[str, Any] = {
    "suffix": None,
    "user": "me",
    "stop": None,
    "seed": None,
    "n": None,
    "best_of": None,
    "logprobs": None,
    "logit_bias": None,
    "echo": None,
    "max_tokens": None,
    "temperature": None,
    "top_p": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "stream": None,
    "stream_options": None,
}


def test_null_is_the_default_in_every_field(app: Any) -> None:
    fields = {"prompt": ["To be", "x"], "seed": 4}
    expected = answer_of(app, **fields, max_tokens=None)["choices"]
    assert answer_of(app, **{**NEUTRAL, **fields})["choices"] == expected
    for option, stream in itertools.product((None, False), (True, False)):
        nulls = {"include_usage": option, "include_obfuscation": None}
        response = send(app, **fields, stream=stream, stream_options=nulls)
        assert response.status_code == 200, response.text
        assert not any(chunk.get("usage") for chunk in (events(response.text)[:-1] if stream else []))
