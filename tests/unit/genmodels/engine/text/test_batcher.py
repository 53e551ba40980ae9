"""Continuous batching: equal to the plain reference in every setting, whoever else asks; fair; no slot is lost."""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from genmodels.data.text import CharTokenizer
from genmodels.engine.text.batcher import Batcher
from genmodels.engine.text.choices import Piece, choice_seed
from genmodels.engine.text.completion import complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.engine.text.sequence import Text
from genmodels.errors import RequestError
from genmodels.family import TextInfo
from genmodels.models.minigpt import MiniGPT, MiniGPTConfig, _Linear
from genmodels.nn.sampling import Sampler, SamplingOptions
from tests.support.schema_bounds import any_value

T = TypeVar("T")

VOCAB = 65
BLOCK = 48
CHARACTERS = "".join(chr(ord("0") + token) for token in range(VOCAB))


def build(**options: Any) -> MiniGPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": BLOCK}
    family = MiniGPT(MiniGPTConfig.model_validate({**sizes, **options}), TextInfo(vocab_size=VOCAB))
    for parameter in family.network.parameters():
        parameter.data *= 3  # as opinionated as a trained one
    return family


FAMILIES = {"rotary": build(), "learned": build(positions="learned", norm="layer", mlp="relu", qk_norm=False)}


ROUNDING = 1e-5  # of logits: engine and reference add in another order


def same_as_reference(family: MiniGPT, found: T, reference: Callable[[MiniGPT], T]) -> bool:
    """Whether the reference gives this, or would if its logits were rounded a little differently.

    Of a hundred thousand draws one or two lie so near the border between two tokens that rounding decides.
    """
    if reference(family) == found:
        return True
    shaken, chance = copy.copy(family), torch.Generator().manual_seed(0)

    def logits(tokens: Tensor) -> Tensor:
        exact = family.logits(tokens)
        return exact + ROUNDING * torch.randn(exact.shape, generator=chance)

    shaken.logits = logits
    return any(reference(shaken) == found for _ in range(40))


class Ask:
    """One answer, and what became of it."""

    def __init__(self, prompt: Sequence[int], seed: int = 0, most: int | None = None, **options: Any) -> None:
        self.prompt, self.seed = list(prompt), seed
        self.options = SamplingOptions.model_validate(options)
        self.most = most
        self.tokens: list[int] = []
        self.ends: list[Exception | None] = []

    def text(self) -> Text:
        sampler = Sampler(self.options, self.seed, self.prompt, VOCAB)
        return Text(self.prompt, sampler, self._take, self.ends.append)

    def has_the_reference_s_tokens(self, family: MiniGPT) -> bool:
        return same_as_reference(
            family, self.tokens, lambda one: list(one.generate(self.prompt, self.seed, self.options))
        )

    def _take(self, token: int, logits: Tensor) -> bool:
        self.tokens.append(token)
        return len(self.tokens) != self.most


def answers(family: MiniGPT, asks: Sequence[Ask], slots: int = 16) -> list[list[int]]:
    batcher = Batcher(family, slots)
    batcher.add(*(ask.text() for ask in asks))
    while batcher.step():
        pass
    assert all(ask.ends == [None] for ask in asks)
    return [ask.tokens for ask in asks]


SETTINGS = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 100).flatmap(lambda n: st.lists(st.integers(0, VOCAB - 1), min_size=n, max_size=n)),
        "seed": st.integers(0, 2**63 - 1),
        "max_tokens": st.integers(1, 80),
        "temperature": st.sampled_from([0, 0.5, 1, 1.7]),
        "top_k": st.sampled_from([None, 1, 5, 200]),
        "top_p": st.sampled_from([1, 0.9, 0.3]),
        "min_p": st.sampled_from([0, 0.1]),
        "repetition_penalty": st.sampled_from([1, 1.3]),
        "presence_penalty": st.sampled_from([0, 0.7, -0.5]),
        "frequency_penalty": st.sampled_from([0, 0.3]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
    }
)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(asked=st.lists(SETTINGS, min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_every_setting_gives_the_reference_s_tokens(family: MiniGPT, asked: list[dict[str, Any]]) -> None:
    asks = [Ask(**one) for one in asked]
    answers(family, asks, slots=4)
    assert all(ask.has_the_reference_s_tokens(family) for ask in asks)


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.text(CHARACTERS, min_size=1, max_size=100),
        "seed": st.integers(0, 2**63 - 1),
        "n": st.integers(1, 3),
        "stop": st.lists(st.text(CHARACTERS[:8], min_size=1, max_size=2), max_size=3),
        "max_tokens": st.integers(1, 60),
        "temperature": st.sampled_from([0, 0.7, 1.5]),
        "top_k": st.sampled_from([None, 8]),
        "top_p": st.sampled_from([1, 0.9]),
        "min_p": st.sampled_from([0, 0.05]),
        "repetition_penalty": st.sampled_from([1, 1.2]),
        "presence_penalty": st.sampled_from([0, 0.5]),
        "frequency_penalty": st.sampled_from([0, 0.4]),
        "logit_bias": st.dictionaries(st.integers(0, 7).map(str), st.floats(0, 6), max_size=3),  # what stops
    }
)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(fields=st.lists(REQUESTS, min_size=1, max_size=8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_every_completion_is_the_reference_s_alone_and_in_company(
    family: MiniGPT, fields: list[dict[str, Any]]
) -> None:
    requests = [CompletionRequest.model_validate(one) for one in fields]
    found = completed(family, requests)
    for request, choices in zip(requests, found, strict=True):
        for index, choice in enumerate(choices):
            assert same_as_reference(family, choice, lambda one, of=(request, index): referred(one, *of))
    assert [completed(family, [request])[0] for request in requests[:2]] == found[:2]


Choice = tuple[str, str | None, int]


def completed(family: MiniGPT, requests: Sequence[CompletionRequest]) -> list[list[Choice]]:
    """Text, finish_reason and tokens of each choice of requests that share one engine."""
    model = TextModel("m@1", family, CharTokenizer(CHARACTERS))
    found: list[list[Any]] = [[] for _ in requests]
    for request, items in zip(requests, found, strict=True):
        complete(model, request).start(items.append)
    while model.batcher.step():
        pass
    return [
        [
            (piece.text, piece.finish_reason, piece.tokens)
            for index in range(request.n)
            for piece in [sum((item for item in items if item.index == index), Piece(index, "", 0))]
        ]
        for request, items in zip(requests, found, strict=True)
    ]


def referred(family: MiniGPT, request: CompletionRequest, index: int) -> Choice:
    """One of them by the plain reference: written to the end, then looked through for stop strings."""
    tokenizer, options = CharTokenizer(CHARACTERS), SamplingOptions.model_validate(request.options)
    seed = choice_seed(request.seed or 0, index)
    text = tokenizer.decode(family.generate(tokenizer.encode(request.prompt), seed, options))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in request.stop if stop in text]
    return (text[: min(ends)[1]], "stop", min(ends)[0]) if ends else (text, "length", len(text))


HONEST = [
    CompletionRequest.model_validate({"prompt": CHARACTERS[at : at + 3], "seed": at, "max_tokens": 25, **options})
    for at, options in enumerate(({}, {"temperature": 0, "logprobs": 5}, {"n": 2, "logprobs": 1, "top_p": 0.9}))
]


def pieces(family: MiniGPT, requests: Sequence[CompletionRequest]) -> list[list[Piece | Exception]]:
    """Each choice of requests that share one engine, with all that is told of it."""
    model = TextModel("m@1", family, CharTokenizer(CHARACTERS))
    found: list[list[Any]] = [[] for _ in requests]
    for request, items in zip(requests, found, strict=True):
        complete(model, request).start(items.append)
    while model.batcher.step():
        pass
    return [sorted(items, key=lambda item: getattr(item, "index", -1)) for items in found]


def mixed(count: int) -> list[Ask]:
    chance = random.Random(0)
    return [
        Ask(
            [chance.randrange(VOCAB) for _ in range(chance.choice([1, 2, 31, 32, 33, 47, 48, 49, 100]))],
            seed,
            max_tokens=chance.choice([1, 5, 60, 120]),
            temperature=chance.choice([0, 0.8]),
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_an_answer_is_the_same_alone_in_any_company_and_in_any_slot(family: MiniGPT) -> None:
    """Of the logits as well, to the bit: a token could agree by luck."""
    company = answers(family, mixed(24))
    assert answers(family, mixed(24)[::-1]) == company[::-1]
    assert [answers(family, [ask])[0] for ask in mixed(24)] == company

    decoder = family.decoder(16)
    prompt = list(range(20))
    alone = [decoder.prefill(slot, prompt, 0) for slot in range(16)]
    assert all(torch.equal(logits, alone[0]) for logits in alone)
    rows = decoder.step([7] * 16, [20] * 16)
    assert all(torch.equal(row, rows[0]) for row in rows)
    only_fifth = decoder.step([None] * 5 + [7] + [None] * 10, [0] * 5 + [20] + [0] * 10)
    assert torch.equal(only_fifth[5], rows[0])


@pytest.mark.parametrize(
    ("threads", "positions", "head_size"),
    [(1, "rotary", 32), (2, "rotary", 32), (1, "learned", 32), (2, "learned", 32), (1, "rotary", 8), (1, "learned", 5)],
)
def test_longer_neighbours_do_not_change_a_bit(threads: int, positions: str, head_size: int) -> None:
    """Attention looks only as far back as the longest sequence goes; what is masked there adds exact zeros.

    Matrix libraries multiply heads of some sizes in another way for other lengths and numbers of sequences.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder, chance = (
            build(positions=positions, block_size=160, n_embd=4 * head_size, n_head=4).decoder(16),
            random.Random(threads),
        )
        for _ in range(12):
            lengths = [chance.choice([1, 2, 31, 32, 33, 63, 64, 65, 100, 128, 159]) for _ in range(16)]
            for slot, length in enumerate(lengths):
                tokens = [chance.randrange(VOCAB) for _ in range(length)]
                for start in range(0, length, decoder.chunk):
                    decoder.prefill(slot, tokens[start : start + decoder.chunk], start)
            together = decoder.step([9] * 16, lengths)
            for slot, length in enumerate(lengths):
                tokens_alone: list[int | None] = [None] * 16
                tokens_alone[slot] = 9
                alone = decoder.step(tokens_alone, [length if at == slot else 0 for at in range(16)])
                assert torch.equal(alone[slot], together[slot])
    finally:
        torch.set_num_threads(before)


def test_a_step_has_only_heights_that_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    heights = build().decoder(16)._heights
    assert heights[-1] == 16
    plain = _Linear.__call__
    monkeypatch.setattr(_Linear, "__call__", lambda self, x: plain(self, x) + 1e-6 * (x.shape[0] == 8))
    assert build().decoder(16)._heights == [height for height in heights if height != 8]


def test_texts_join_and_leave_at_every_step() -> None:
    family = FAMILIES["rotary"]
    batcher, asks = Batcher(family, slots=4), mixed(12)
    for ask in asks:
        batcher.add(ask.text())
        batcher.step()
        batcher.step()
    while batcher.step():
        pass
    assert all(ask.has_the_reference_s_tokens(family) for ask in asks)


def test_a_long_prompt_does_not_hold_up_those_who_write() -> None:
    family = build(block_size=512)
    batcher, writing = Batcher(family, slots=8), Ask([1], max_tokens=40)
    batcher.add(writing.text())
    batcher.step()
    batcher.add(*(Ask([2] * 500, max_tokens=1).text() for _ in range(6)))
    for written in range(2, 20):
        batcher.step()
        assert len(writing.tokens) == written  # a token each step, while 6 x 16 chunks are read


def test_who_has_enough_or_leaves_frees_the_slot_within_a_step() -> None:
    batcher = Batcher(FAMILIES["rotary"], slots=1)
    enough, leaves, last = Ask([1], most=3, max_tokens=50), Ask([1], max_tokens=50), Ask([1], max_tokens=1)
    texts = [ask.text() for ask in (enough, leaves, last)]
    batcher.add(*texts)
    for _ in range(5):
        batcher.step()
    assert (len(enough.tokens), len(leaves.tokens), enough.ends) == (3, 2, [None])
    texts[1].unwanted = True
    assert not batcher.step()
    assert (len(leaves.tokens), leaves.ends, len(last.tokens)) == (2, [None], 1)


def test_a_full_queue_refuses_all_of_a_request() -> None:
    batcher = Batcher(FAMILIES["rotary"], slots=2, max_waiting=1)
    batcher.add(*(Ask([1]).text() for _ in range(2)))
    batcher.step()
    with pytest.raises(RequestError, match="0 texts wait already; try again in a moment") as error:
        batcher.add(*(Ask([1]).text() for _ in range(2)))
    assert (error.value.status, error.value.code) == (429, "queue_full")
    batcher.add(Ask([1]).text())


def test_closing_serves_what_is_under_way_and_what_waits() -> None:
    batcher, asks = Batcher(FAMILIES["rotary"], slots=1), [Ask([1], max_tokens=30) for _ in range(3)]
    batcher.add(*(ask.text() for ask in asks))
    batcher.close()
    run(batcher).join(20)
    assert [(len(ask.tokens), ask.ends) for ask in asks] == [(30, [None])] * 3
    with pytest.raises(RequestError, match="unloaded just now"):
        batcher.add(Ask([1]).text())


BREAKS = {
    "take": lambda text: setattr(text, "take", lambda *_: 1 / 0),
    "read": lambda text: setattr(text, "on_read", lambda *_: 1 / 0),
    "adjust": lambda text: setattr(text.sampler, "adjust", lambda *_: 1 / 0),
    "bias": lambda text: setattr(text.sampler, "_bias", torch.zeros(VOCAB + 1)),
    "overflow": lambda text: setattr(text.sampler, "adjust", lambda row: row * math.inf),
    "no mass": lambda text: setattr(text.sampler, "options", text.sampler.options.model_copy(update={"top_p": 0.0})),
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=list(BREAKS))
def test_a_text_that_breaks_ends_alone(breaks: Any) -> None:
    family, broken, asks = FAMILIES["rotary"], Ask([5, 6, 7], max_tokens=9, presence_penalty=1), mixed(8)
    batcher, text = Batcher(family), broken.text()
    breaks(text)
    batcher.add(*(ask.text() for ask in asks[:4]), text, *(ask.text() for ask in asks[4:]))
    while batcher.step():
        pass
    (error,) = broken.ends
    assert isinstance(error, ZeroDivisionError | RuntimeError | RequestError)
    assert not isinstance(error, RequestError) or error.code == "not_finite"
    assert all(ask.has_the_reference_s_tokens(family) for ask in asks)
    assert all(ask.ends == [None] for ask in asks)


ODD = st.fixed_dictionaries(
    {"prompt": st.text(CHARACTERS, min_size=1, max_size=60), "n": st.integers(1, 3), "seed": st.integers(0, 2**63 - 1)},
    optional={name: any_value(field) for name, field in SamplingOptions.model_json_schema()["properties"].items()},
)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(odd=st.lists(ODD, min_size=1, max_size=5), chance=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_request_changes_the_answers_of_others(
    family: MiniGPT, odd: list[dict[str, Any]], chance: random.Random
) -> None:
    """Answers with all their log-probabilities, to the bit: alone, and among any other valid requests."""
    others = [
        CompletionRequest.model_validate({**one, "max_tokens": min(one.get("max_tokens", 9), 30) or 1}) for one in odd
    ]
    together = [*HONEST, *others]
    chance.shuffle(together)
    found = pieces(family, together)
    for request in HONEST:
        place = next(at for at, one in enumerate(together) if one is request)
        assert found[place] == pieces(family, [request])[0]


def test_options_that_no_number_survives_end_their_own_text() -> None:
    """As if the bounds of options were not there."""
    hostile = [
        {"repetition_penalty": 1e-310},
        {"repetition_penalty": 1e-310, "temperature": 0},
        {"temperature": math.nan},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: math.nan}, "frequency_penalty": 1},
        {"presence_penalty": -math.inf},
        {"top_p": 0.0, "presence_penalty": 1},
        {"min_p": 2.0, "repetition_penalty": 1.1},
    ]
    family, asks, broken = FAMILIES["rotary"], mixed(8), [Ask([1, 2, 3]) for _ in hostile]
    for ask, options in zip(broken, hostile, strict=True):
        ask.options = SamplingOptions().model_copy(update=options)
    batcher = Batcher(family)
    batcher.add(*(ask.text() for pair in zip(asks, broken, strict=True) for ask in pair))
    while batcher.step():
        pass
    assert [[getattr(error, "code", error) for error in ask.ends] for ask in broken] == [["not_finite"]] * len(hostile)
    assert [ask.ends for ask in asks] == [[None]] * 8
    assert [ask.tokens for ask in asks] == answers(family, mixed(8))


@pytest.mark.parametrize("options", [{"temperature": 5e-324}, {"temperature": 1e-300}, {"top_p": 1e-310}])
def test_the_smallest_options_take_the_most_probable_token(options: dict[str, float]) -> None:
    small, greedy = Ask([1, 2], max_tokens=20, **options), Ask([1, 2], max_tokens=20, temperature=0)
    assert answers(FAMILIES["rotary"], [small]) == answers(FAMILIES["rotary"], [greedy])


def test_a_prompt_of_tokens_that_there_are_not_is_refused() -> None:
    for token in (-1, VOCAB, 2**70):
        with pytest.raises(RequestError, match=f"prompt: token {token} does not exist; this model's are 0 to 64"):
            Ask([1, token]).text()


def test_a_text_nobody_can_be_told_of_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As where the event loop is gone that its pieces went to."""
    batcher, ask = Batcher(FAMILIES["rotary"]), Ask([1, 2], max_tokens=5)
    deaf = Ask([1, 2]).text()
    deaf.take = deaf.end = lambda *_: 1 / 0
    batcher.add(deaf, ask.text())
    while batcher.step():
        pass
    assert ask.has_the_reference_s_tokens(FAMILIES["rotary"])
    assert "could not be told: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("prompt", [[3], [3, 4]], ids=["step", "prefill"])
def test_numbers_that_are_not_finite_end_their_own_text(
    monkeypatch: pytest.MonkeyPatch, number: float, prompt: list[int]
) -> None:
    family = FAMILIES["rotary"]
    batcher, broken = Batcher(family, slots=4), Ask(prompt)
    asks = [Ask([1], max_tokens=20), Ask([2] * 40, max_tokens=20)]
    step, prefill = batcher._decoder.step, batcher._decoder.prefill

    def spoilt_step(tokens: Any, positions: Any) -> Tensor:
        logits = step(tokens, positions).clone()
        logits[1, 7] = number
        return logits

    def spoilt_prefill(slot: int, tokens: Any, start: int) -> Tensor:
        logits = prefill(slot, tokens, start).clone()
        if slot == 1:
            logits[-1, 7] = number
        return logits

    monkeypatch.setattr(batcher._decoder, "step", spoilt_step)
    monkeypatch.setattr(batcher._decoder, "prefill", spoilt_prefill)
    batcher.add(asks[0].text(), broken.text(), asks[1].text())
    while batcher.step():
        pass
    (error,) = broken.ends
    assert isinstance(error, RequestError)
    assert (error.status, error.code, broken.tokens) == (500, "not_finite", [])
    assert all(ask.has_the_reference_s_tokens(family) for ask in asks)


@pytest.mark.parametrize("prompt", [[3], [3, 4]], ids=["step", "prefill"])
def test_a_slot_that_was_spoilt_is_clean_for_the_next(prompt: list[int]) -> None:
    family, ask = FAMILIES["rotary"], Ask(prompt, max_tokens=20)
    batcher = Batcher(family, slots=1)
    for layer in batcher._decoder._layers:  # type: ignore[attr-defined]
        layer._kept = torch.full_like(layer._kept, float("nan"))
    batcher.add(ask.text())
    while batcher.step():
        pass
    assert ask.has_the_reference_s_tokens(family)


def test_a_pass_that_fails_ends_the_texts_in_it_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["rotary"]
    batcher, writing, reading = Batcher(family), Ask([1], max_tokens=9), Ask([2] * 47, max_tokens=3)
    monkeypatch.setattr(batcher._decoder, "step", lambda *_: 1 / 0)
    batcher.add(writing.text(), reading.text())
    batcher.step()
    assert ([type(error) for error in writing.ends], reading.ends) == ([ZeroDivisionError], [])
    monkeypatch.undo()
    while batcher.step():
        pass
    assert reading.has_the_reference_s_tokens(family)
    assert reading.ends == [None]


def test_a_pass_that_one_text_makes_fail_ends_that_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    family, bad = FAMILIES["rotary"], VOCAB - 1

    def others() -> list[Ask]:
        return [Ask([token], seed=token, max_tokens=20, logit_bias={bad: -100}) for token in range(5)]

    batcher, asks, broken = Batcher(family), others(), Ask([bad])
    step = batcher._decoder.step
    monkeypatch.setattr(
        batcher._decoder, "step", lambda tokens, places: 1 / 0 if bad in tokens else step(tokens, places)
    )
    batcher.add(*(ask.text() for ask in asks[:3]), broken.text(), *(ask.text() for ask in asks[3:]))
    while batcher.step():
        pass
    assert [type(error) for error in broken.ends] == [ZeroDivisionError]
    assert [ask.tokens for ask in asks] == answers(family, others())


def test_what_breaks_between_texts_ends_them_all_and_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, asks = Batcher(FAMILIES["rotary"], slots=1), [Ask([1], max_tokens=3) for _ in range(2)]
    monkeypatch.setattr(batcher, "_admit", lambda: 1 / 0)
    batcher.add(*(ask.text() for ask in asks))
    batcher.close()
    run(batcher).join(20)
    assert [[type(error) for error in ask.ends] for ask in asks] == [[ZeroDivisionError]] * 2


def run(batcher: Batcher) -> threading.Thread:
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    return thread
