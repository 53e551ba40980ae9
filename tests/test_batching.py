"""Continuous batching: equal to the plain reference in every setting, whoever else asks; fair; no slot is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from genmodels.engine.batching import Batcher, Text
from genmodels.errors import RequestError
from genmodels.family import TextInfo
from genmodels.models.minigpt import MiniGPT, MiniGPTConfig
from genmodels.sampling import Sampler, SamplingOptions

VOCAB = 65
BLOCK = 48


def build(**options: Any) -> MiniGPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": BLOCK}
    family = MiniGPT(MiniGPTConfig.model_validate({**sizes, **options}), TextInfo(vocab_size=VOCAB))
    for parameter in family.network.parameters():
        parameter.data *= 3  # as opinionated as a trained one
    return family


FAMILIES = {"rotary": build(), "learned": build(positions="learned", norm="layer", mlp="relu", qk_norm=False)}


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

    def reference(self, family: MiniGPT) -> list[int]:
        return list(family.generate(self.prompt, self.seed, self.options))

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
    assert answers(family, asks, slots=4) == [ask.reference(family) for ask in asks]


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


def test_texts_join_and_leave_at_every_step() -> None:
    family = FAMILIES["rotary"]
    batcher, asks = Batcher(family, slots=4), mixed(12)
    for ask in asks:
        batcher.add(ask.text())
        batcher.step()
        batcher.step()
    while batcher.step():
        pass
    assert [ask.tokens for ask in asks] == [ask.reference(family) for ask in asks]


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


def test_closing_ends_what_is_under_way_first() -> None:
    batcher, ask = Batcher(FAMILIES["rotary"]), Ask([1], max_tokens=30)
    batcher.add(ask.text())
    batcher.close()
    thread = threading.Thread(target=batcher.run)
    thread.start()
    thread.join(20)
    assert (thread.is_alive(), len(ask.tokens), ask.ends) == (False, 30, [None])
    with pytest.raises(RequestError, match="unloaded just now"):
        batcher.add(Ask([1]).text())


def test_an_error_ends_every_text_and_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, ask = Batcher(FAMILIES["rotary"]), Ask([1], max_tokens=3)
    plain = batcher._decoder.step
    monkeypatch.setattr(batcher._decoder, "step", lambda *_: 1 / 0)
    thread = threading.Thread(target=batcher.run)
    thread.start()
    broken = Ask([1])
    ended = threading.Event()
    text = broken.text()
    text.end = lambda error: (broken.ends.append(error), ended.set())[0]  # type: ignore[func-returns-value]
    batcher.add(text)
    assert ended.wait(20)
    assert isinstance(broken.ends[0], ZeroDivisionError)
    monkeypatch.setattr(batcher._decoder, "step", plain)
    batcher.add(ask.text())
    batcher.close()
    thread.join(20)
    assert (len(ask.tokens), ask.ends) == (3, [None])
