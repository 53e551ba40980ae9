"""Test clients of OpenAI's completions with the gateway on a real socket: openai, LangChain, lm-eval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import tiktoken
from langchain_openai import OpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from genmodels.keys import Keys
from genmodels.storage import Storage, open_storage
from services.gateway.model_host import ModelHost
from services.gateway.routes import create_app
from tests.support.asgi_server import served
from tests.support.published_models import VOCABULARY, publish

PROMPTS = ["To be", "Or not to be", "x"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("models").as_uri())
    publish(storage, "play", "minigpt", block_size=64)
    return storage


@pytest.fixture(scope="module")
def key(models: Storage) -> str:
    return Keys(models).create("client", ("generate",))[1]


@pytest.fixture(scope="module")
def url(models: Storage, key: str) -> Iterator[str]:
    with served(create_app(ModelHost(models.url), keys=Keys(models))) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def vocabulary(client: openai.OpenAI) -> dict[str, int]:
    response = client.get("/models/play/vocabulary", cast_to=httpx.Response).json()
    return {token["text"]: token["id"] for token in response["data"]}


# OpenAI's own


def test_openai_s_client_sends_every_form_of_prompt(client: openai.OpenAI, vocabulary: dict[str, int]) -> None:
    ids = [[vocabulary[character] for character in prompt] for prompt in PROMPTS]
    fields: dict[str, Any] = {"model": "play", "seed": 3, "max_tokens": 9, "n": 2, "logprobs": 2, "echo": True}
    texts = client.completions.create(prompt=PROMPTS, **fields)
    assert [choice.text[:-9] for choice in texts.choices] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert client.completions.create(prompt=ids, **fields).choices == texts.choices
    for prompt, own in ((PROMPTS[0], texts.choices[:2]), (ids[0], texts.choices[:2])):
        assert client.completions.create(prompt=prompt, **fields).choices == own
    chunks = list(client.completions.create(prompt=ids, stream=True, **fields))
    for choice in texts.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(prompt=[[0], [len(vocabulary)]], **fields)
    assert error.value.param == "prompt[1][0]"


# LangChain


@pytest.fixture
def langchain(url: str, key: str) -> Iterator[Callable[..., OpenAI]]:
    made = []

    def make(**options: Any) -> OpenAI:
        made.append(OpenAI(model="play", base_url=url, api_key=key, max_retries=0, **options))
        return made[-1]

    yield make
    for model in made:
        model.client._client.close()


def test_langchain_s_defaults_are_answered(langchain: Callable[..., OpenAI]) -> None:
    model = langchain()
    assert len(model.invoke("To be")) == 256
    assert list(map(len, model.batch(PROMPTS))) == [256] * 3


def test_langchain_gets_the_answers_that_each_prompt_has_alone(
    langchain: Callable[..., OpenAI], client: openai.OpenAI
) -> None:
    chain = langchain(max_tokens=12, seed=5)

    async def together() -> list[str]:
        try:
            return await chain.abatch(PROMPTS)
        finally:
            await chain.async_client._client.close()

    fields: dict[str, Any] = {"model": "play", "temperature": 0.7, "max_tokens": 12, "seed": 5}
    alone = [client.completions.create(prompt=prompt, **fields).choices[0].text for prompt in PROMPTS]
    assert [chain.invoke(prompt) for prompt in PROMPTS] == alone
    assert chain.batch(PROMPTS) == alone
    assert asyncio.run(together()) == alone
    assert ["".join(chain.stream(prompt)) for prompt in PROMPTS] == alone
    result = chain.generate(PROMPTS)
    assert [generation[0].text for generation in result.generations] == alone
    assert result.llm_output is not None
    assert result.llm_output["token_usage"] == {"prompt_tokens": 18, "completion_tokens": 36, "total_tokens": 54}


def test_langchain_sorts_choices_to_their_prompts(langchain: Callable[..., OpenAI]) -> None:
    many = langchain(max_tokens=12, seed=5, n=2, best_of=4)
    result = many.generate(PROMPTS, stop=["q"])
    assert list(map(len, result.generations)) == [2, 2, 2]
    for prompt, generations in zip(PROMPTS, result.generations, strict=True):
        assert [one.text for one in many.generate([prompt], stop=["q"]).generations[0]] == [
            one.text for one in generations
        ]
    assert len(langchain(max_tokens=12).generate(["To be"] * 45).generations) == 45  # three requests of at most 20


# lm-evaluation-harness


@pytest.fixture
def harness(url: str, key: str, vocabulary: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make lm-eval's model, with a tokenizer built from the vocabulary that the endpoint returns."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    ranks = {text.encode(): token for text, token in vocabulary.items()}
    encoding = tiktoken.Encoding("play", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda model: {"play": encoding}[model])

    def make(**options: Any) -> LocalCompletionsAPI:
        defaults: dict[str, Any] = {"max_length": 64, "max_retries": 1, "eos_string": "<|end|>"}
        return LocalCompletionsAPI(base_url=f"{url}/completions", model="play", **{**defaults, **options})

    return make


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


LIKELIHOODS = [("To be", " or not"), ("x", "yz"), ("Some context that is longer", "!"), ("a", "b")]
WAYS = [
    {"batch_size": batch, "num_concurrent": concurrent, "tokenized_requests": tokens}
    for batch in (1, 3)
    for concurrent in (1, 2)
    for tokens in (True, False)
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_lm_eval_measures_continuations(harness: Any, client: openai.OpenAI, way: dict[str, Any]) -> None:
    results = harness(tokenizer_backend="tiktoken", **way).loglikelihood(
        instances("loglikelihood", *LIKELIHOODS), disable_tqdm=True
    )
    for (context, continuation), (sum_of_logs, greedy) in zip(LIKELIHOODS, results, strict=True):
        (choice,) = client.completions.create(
            model="play", prompt=context + continuation, echo=True, logprobs=0, max_tokens=0
        ).choices
        assert choice.logprobs is not None
        logprobs = choice.logprobs.token_logprobs or []
        assert sum_of_logs == pytest.approx(sum(logprobs[len(context) :]), abs=1e-9)
        (best,) = client.completions.create(
            model="play", prompt=context, temperature=0, max_tokens=len(continuation)
        ).choices
        assert greedy == (best.text == continuation)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_lm_eval_generates(harness: Any, client: openai.OpenAI, way: dict[str, Any]) -> None:
    arguments = {"until": ["\n\n", "Q:", "</s>", "<|im_end|>", "qu"], "max_gen_toks": 20, "do_sample": False}
    texts = harness(tokenizer_backend="tiktoken", **way).generate_until(
        instances("generate_until", *((prompt, arguments) for prompt in PROMPTS)), disable_tqdm=True
    )
    alone = [
        client.completions.create(
            model="play", prompt=prompt, temperature=0, max_tokens=20, stop=["\n\n", "Q:", "</s>", "qu"]
        ).choices[0]
        for prompt in PROMPTS
    ]
    assert texts == [choice.text for choice in alone]


def test_lm_eval_without_a_tokenizer_generates(harness: Any) -> None:
    model = harness(tokenizer_backend=None, batch_size=2)
    arguments = {"until": "\n", "max_gen_toks": 5, "temperature": 0.7}
    texts = model.generate_until(instances("generate_until", *((prompt, arguments) for prompt in PROMPTS)))
    assert [len(text.partition("\n")[0]) <= 5 for text in texts] == [True] * 3


def test_lm_eval_measures_long_texts_in_windows(harness: Any) -> None:
    text = VOCABULARY[1:] * 3
    model = harness(tokenizer_backend="tiktoken", custom_prefix_token_id=0, batch_size=2)
    (log_likelihood,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert -len(text) * 8 < log_likelihood < 0
