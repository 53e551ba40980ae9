"""Test continuous batching: every answer equals the plain reference, in any batch; it is fair and loses no slot."""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from genmodels.data.text import CharTokenizer
from genmodels.declarations.minigpt import MiniGPTConfig
from genmodels.engine.text.batcher import ContinuousBatcher
from genmodels.engine.text.choices import TextDelta, choice_seed
from genmodels.engine.text.completion import complete
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.engine.text.sequence import Sequence
from genmodels.errors import RequestError
from genmodels.family import TextInfo
from genmodels.models.minigpt import MiniGPT, _Linear
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
        parameter.data *= 3  # with logits as different as a trained model's
    return family


FAMILIES = {"rotary": build(), "learned": build(positions="learned", norm="layer", mlp="relu", qk_norm=False)}


ROUNDING = 1e-5  # tolerance of logits: engine and reference add in a different order


def same_as_reference(family: MiniGPT, result: T, reference: Callable[[MiniGPT], T]) -> bool:
    """Return True if the reference gives this result, or could give it with logits that are rounded differently.

    Of a hundred thousand draws, one or two lie so near the border between two tokens that rounding decides.
    """
    if reference(family) == result:
        return True
    rounded, rng = copy.copy(family), torch.Generator().manual_seed(0)

    def logits(tokens: Tensor) -> Tensor:
        exact = family.logits(tokens)
        return exact + ROUNDING * torch.randn(exact.shape, generator=rng)

    rounded.logits = logits
    return any(reference(rounded) == result for _ in range(40))


class Client:
    """Act as a client of the batcher: keep the tokens and the end of one sequence."""

    def __init__(self, prompt: Iterable[int], seed: int = 0, max_wanted: int | None = None, **options: Any) -> None:
        self.prompt, self.seed = list(prompt), seed
        self.options = SamplingOptions.model_validate(options)
        self.max_wanted = max_wanted
        self.tokens: list[int] = []
        self.ends: list[Exception | None] = []

    def sequence(self) -> Sequence:
        sampler = Sampler(self.options, self.seed, self.prompt, VOCAB)
        return Sequence(self.prompt, sampler, self._on_token, self.ends.append)

    def matches_reference(self, family: MiniGPT) -> bool:
        return same_as_reference(
            family, self.tokens, lambda one: list(one.generate(self.prompt, self.seed, self.options))
        )

    def _on_token(self, token: int, logits: Tensor) -> bool:
        self.tokens.append(token)
        return len(self.tokens) != self.max_wanted


def answers(family: MiniGPT, clients: list[Client], slots: int = 16) -> list[list[int]]:
    batcher = ContinuousBatcher(family, slots)
    batcher.add(*(client.sequence() for client in clients))
    while batcher.step():
        pass
    assert all(client.ends == [None] for client in clients)
    return [client.tokens for client in clients]


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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(requests=st.lists(SETTINGS, min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_the_tokens_equal_the_reference_in_every_setting(family: MiniGPT, requests: list[dict[str, Any]]) -> None:
    clients = [Client(**one) for one in requests]
    answers(family, clients, slots=4)
    assert all(client.matches_reference(family) for client in clients)


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
        "logit_bias": st.dictionaries(
            st.integers(0, 7).map(str), st.floats(0, 6), max_size=3
        ),  # characters of the stop strings
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(fields=st.lists(REQUESTS, min_size=1, max_size=8))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_completion_equals_the_reference_alone_and_in_company(family: MiniGPT, fields: list[dict[str, Any]]) -> None:
    requests = [CompletionRequest.model_validate(one) for one in fields]
    results = completed(family, requests)
    for request, choices in zip(requests, results, strict=True):
        for index, choice in enumerate(choices):
            assert same_as_reference(family, choice, lambda one, of=(request, index): reference_choice(one, *of))
    assert [completed(family, [request])[0] for request in requests[:2]] == results[:2]


Choice = tuple[str, str | None, int]


def completed(family: MiniGPT, requests: list[CompletionRequest]) -> list[list[Choice]]:
    """Return text, finish_reason and tokens of each choice of requests that share one batcher."""
    model = TextModel("m@1", family, CharTokenizer(CHARACTERS))
    results: list[list[Any]] = [[] for _ in requests]
    for request, items in zip(requests, results, strict=True):
        complete(model, request).start(items.append)
    while model.batcher.step():
        pass
    return [
        [
            (delta.text, delta.finish_reason, delta.tokens)
            for index in range(request.n)
            for delta in [sum((item for item in items if item.index == index), TextDelta(index, "", 0))]
        ]
        for request, items in zip(requests, results, strict=True)
    ]


def reference_choice(family: MiniGPT, request: CompletionRequest, index: int) -> Choice:
    """Compute one choice with the plain reference: generate all tokens, then search for stop strings."""
    tokenizer, options = CharTokenizer(CHARACTERS), SamplingOptions.model_validate(request.options)
    seed = choice_seed(request.seed or 0, index)
    text = tokenizer.decode(family.generate(tokenizer.encode(request.prompt), seed, options))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in request.stop if stop in text]
    return (text[: min(ends)[1]], "stop", min(ends)[0]) if ends else (text, "length", len(text))


HONEST = [
    CompletionRequest.model_validate({"prompt": CHARACTERS[at : at + 3], "seed": at, "max_tokens": 25, **options})
    for at, options in enumerate(({}, {"temperature": 0, "logprobs": 5}, {"n": 2, "logprobs": 1, "top_p": 0.9}))
]


def deltas(family: MiniGPT, requests: list[CompletionRequest]) -> list[list[TextDelta | Exception]]:
    """Return all deltas of each choice of requests that share one batcher."""
    model = TextModel("m@1", family, CharTokenizer(CHARACTERS))
    results: list[list[Any]] = [[] for _ in requests]
    for request, items in zip(requests, results, strict=True):
        complete(model, request).start(items.append)
    while model.batcher.step():
        pass
    return [sorted(items, key=lambda item: getattr(item, "index", -1)) for items in results]


def mixed(count: int) -> list[Client]:
    rng = random.Random(0)
    return [
        Client(
            [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 31, 32, 33, 47, 48, 49, 100]))],
            seed,
            max_tokens=rng.choice([1, 5, 60, 120]),
            temperature=rng.choice([0, 0.8]),
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_an_answer_is_the_same_alone_in_any_company_and_in_any_slot(family: MiniGPT) -> None:
    """The logits are compared too, bit by bit: equal tokens could be luck."""
    company = answers(family, mixed(24))
    assert answers(family, mixed(24)[::-1]) == company[::-1]
    assert [answers(family, [client])[0] for client in mixed(24)] == company

    decoder = family.decoder(16)
    prompt = list(range(20))
    alone = [decoder.prefill(slot, prompt, 0) for slot in range(16)]
    assert all(torch.equal(logits, alone[0]) for logits in alone)
    rows = decoder.step([7] * 16, [20] * 16)
    assert all(torch.equal(row, rows[0]) for row in rows)
    only_fifth = decoder.step([None] * 5 + [7] + [None] * 10, [0] * 5 + [20] + [0] * 10)
    assert torch.equal(only_fifth[5], rows[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "positions", "head_size"),
    [(1, "rotary", 32), (2, "rotary", 32), (1, "learned", 32), (2, "learned", 32), (1, "rotary", 8), (1, "learned", 5)],
)
def test_longer_neighbours_do_not_change_a_bit(threads: int, positions: str, head_size: int) -> None:
    """Attention reads as many positions as the longest sequence has; masked positions add exact zeros.

    Matrix libraries multiply heads of some sizes in another way for other lengths and numbers of sequences.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = build(positions=positions, block_size=160, n_embd=4 * head_size, n_head=4).decoder(16)
        rng = random.Random(threads)
        for _ in range(12):
            lengths = [rng.choice([1, 2, 31, 32, 33, 63, 64, 65, 100, 128, 159]) for _ in range(16)]
            for slot, length in enumerate(lengths):
                tokens = [rng.randrange(VOCAB) for _ in range(length)]
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


def test_sequences_join_and_finish_at_every_step() -> None:
    family = FAMILIES["rotary"]
    batcher, clients = ContinuousBatcher(family, slots=4), mixed(12)
    for client in clients:
        batcher.add(client.sequence())
        batcher.step()
        batcher.step()
    while batcher.step():
        pass
    assert all(client.matches_reference(family) for client in clients)


def test_a_long_prompt_does_not_delay_running_sequences() -> None:
    family = build(block_size=512)
    batcher, writing = ContinuousBatcher(family, slots=8), Client([1], max_tokens=40)
    batcher.add(writing.sequence())
    batcher.step()
    batcher.add(*(Client([2] * 500, max_tokens=1).sequence() for _ in range(6)))
    for written in range(2, 20):
        batcher.step()
        assert len(writing.tokens) == written  # one token in each step, while 6 x 16 chunks of prompts are computed


def test_a_finished_or_cancelled_sequence_frees_its_slot_within_a_step() -> None:
    batcher = ContinuousBatcher(FAMILIES["rotary"], slots=1)
    enough, cancelled, last = (
        Client([1], max_wanted=3, max_tokens=50),
        Client([1], max_tokens=50),
        Client([1], max_tokens=1),
    )
    sequences = [client.sequence() for client in (enough, cancelled, last)]
    batcher.add(*sequences)
    for _ in range(5):
        batcher.step()
    assert (len(enough.tokens), len(cancelled.tokens), enough.ends) == (3, 2, [None])
    sequences[1].cancelled = True
    assert not batcher.step()
    assert (len(cancelled.tokens), cancelled.ends, len(last.tokens)) == (2, [None], 1)


def test_a_full_queue_refuses_all_of_a_request() -> None:
    batcher = ContinuousBatcher(FAMILIES["rotary"], slots=2, max_waiting=1)
    batcher.add(*(Client([1]).sequence() for _ in range(2)))
    batcher.step()
    with pytest.raises(RequestError, match="0 texts wait already; try again in a moment") as error:
        batcher.add(*(Client([1]).sequence() for _ in range(2)))
    assert (error.value.status, error.value.code) == (429, "queue_full")
    batcher.add(Client([1]).sequence())


def test_closing_completes_running_and_waiting_sequences() -> None:
    batcher, clients = ContinuousBatcher(FAMILIES["rotary"], slots=1), [Client([1], max_tokens=30) for _ in range(3)]
    batcher.add(*(client.sequence() for client in clients))
    batcher.close()
    run(batcher).join(20)
    assert [(len(client.tokens), client.ends) for client in clients] == [(30, [None])] * 3
    with pytest.raises(RequestError, match="unloaded just now"):
        batcher.add(Client([1]).sequence())


BREAKS = {
    "on_token": lambda sequence: setattr(sequence, "on_token", lambda *_: 1 / 0),
    "on_prompt_logits": lambda sequence: setattr(sequence, "on_prompt_logits", lambda *_: 1 / 0),
    "adjust": lambda sequence: setattr(sequence.sampler, "adjust", lambda *_: 1 / 0),
    "bias": lambda sequence: setattr(sequence.sampler, "_bias", torch.zeros(VOCAB + 1)),
    "overflow": lambda sequence: setattr(sequence.sampler, "adjust", lambda row: row * math.inf),
    "no mass": lambda sequence: setattr(
        sequence.sampler, "options", sequence.sampler.options.model_copy(update={"top_p": 0.0})
    ),
}


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=list(BREAKS))
def test_a_sequence_with_an_error_ends_alone(breaks: Any) -> None:
    family, broken, clients = FAMILIES["rotary"], Client([5, 6, 7], max_tokens=9, presence_penalty=1), mixed(8)
    batcher, sequence = ContinuousBatcher(family), broken.sequence()
    breaks(sequence)
    batcher.add(
        *(client.sequence() for client in clients[:4]), sequence, *(client.sequence() for client in clients[4:])
    )
    while batcher.step():
        pass
    (error,) = broken.ends
    assert isinstance(error, ZeroDivisionError | RuntimeError | RequestError)
    assert not isinstance(error, RequestError) or error.code == "not_finite"
    assert all(client.matches_reference(family) for client in clients)
    assert all(client.ends == [None] for client in clients)


ODD = st.fixed_dictionaries(
    {"prompt": st.text(CHARACTERS, min_size=1, max_size=60), "n": st.integers(1, 3), "seed": st.integers(0, 2**63 - 1)},
    optional={name: any_value(field) for name, field in SamplingOptions.model_json_schema()["properties"].items()},
)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@given(odd=st.lists(ODD, min_size=1, max_size=5), rng=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_request_changes_the_answers_of_others(
    family: MiniGPT, odd: list[dict[str, Any]], rng: random.Random
) -> None:
    """Answers with all log-probabilities are equal to the bit, alone and among any other valid requests."""
    others = [
        CompletionRequest.model_validate({**one, "max_tokens": min(one.get("max_tokens", 9), 30) or 1}) for one in odd
    ]
    together = [*HONEST, *others]
    rng.shuffle(together)
    results = deltas(family, together)
    for request in HONEST:
        place = next(at for at, one in enumerate(together) if one is request)
        assert results[place] == deltas(family, [request])[0]


def test_options_that_overflow_end_only_their_own_sequence() -> None:
    """The options skip validation, as if they had no bounds."""
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
    family, clients, broken = FAMILIES["rotary"], mixed(8), [Client([1, 2, 3]) for _ in hostile]
    for client, options in zip(broken, hostile, strict=True):
        client.options = SamplingOptions().model_copy(update=options)
    batcher = ContinuousBatcher(family)
    batcher.add(*(client.sequence() for pair in zip(clients, broken, strict=True) for client in pair))
    while batcher.step():
        pass
    assert [[getattr(error, "code", error) for error in client.ends] for client in broken] == [["not_finite"]] * len(
        hostile
    )
    assert [client.ends for client in clients] == [[None]] * 8
    assert [client.tokens for client in clients] == answers(family, mixed(8))


@pytest.mark.parametrize("options", [{"temperature": 5e-324}, {"temperature": 1e-300}, {"top_p": 1e-310}])
def test_the_smallest_options_take_the_most_probable_token(options: dict[str, float]) -> None:
    small, greedy = Client([1, 2], max_tokens=20, **options), Client([1, 2], max_tokens=20, temperature=0)
    assert answers(FAMILIES["rotary"], [small]) == answers(FAMILIES["rotary"], [greedy])


def test_a_prompt_with_unknown_tokens_is_refused() -> None:
    for token in (-1, VOCAB, 2**70):
        with pytest.raises(RequestError, match=f"prompt: token {token} does not exist; this model's are 0 to 64"):
            Client([1, token]).sequence()


def test_a_sequence_whose_caller_is_gone_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The callbacks fail, as when the event loop of the caller is closed."""
    batcher, client = ContinuousBatcher(FAMILIES["rotary"]), Client([1, 2], max_tokens=5)
    gone = Client([1, 2]).sequence()
    gone.on_token = gone.on_finish = lambda *_: 1 / 0
    batcher.add(gone, client.sequence())
    while batcher.step():
        pass
    assert client.matches_reference(FAMILIES["rotary"])
    assert "could not be notified of its end: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("prompt", [[3], [3, 4]], ids=["step", "prefill"])
def test_logits_that_are_not_finite_end_only_their_own_sequence(
    monkeypatch: pytest.MonkeyPatch, number: float, prompt: list[int]
) -> None:
    family = FAMILIES["rotary"]
    batcher, broken = ContinuousBatcher(family, slots=4), Client(prompt)
    clients = [Client([1], max_tokens=20), Client([2] * 40, max_tokens=20)]
    step, prefill = batcher._decoder.step, batcher._decoder.prefill

    def broken_step(tokens: Any, positions: Any) -> Tensor:
        logits = step(tokens, positions).clone()
        logits[1, 7] = number
        return logits

    def broken_prefill(slot: int, tokens: Any, start: int) -> Tensor:
        logits = prefill(slot, tokens, start).clone()
        if slot == 1:
            logits[-1, 7] = number
        return logits

    monkeypatch.setattr(batcher._decoder, "step", broken_step)
    monkeypatch.setattr(batcher._decoder, "prefill", broken_prefill)
    batcher.add(clients[0].sequence(), broken.sequence(), clients[1].sequence())
    while batcher.step():
        pass
    (error,) = broken.ends
    assert isinstance(error, RequestError)
    assert (error.status, error.code, broken.tokens) == (500, "not_finite", [])
    assert all(client.matches_reference(family) for client in clients)


@pytest.mark.parametrize("prompt", [[3], [3, 4]], ids=["step", "prefill"])
def test_a_slot_that_was_broken_is_clean_for_the_next(prompt: list[int]) -> None:
    family, client = FAMILIES["rotary"], Client(prompt, max_tokens=20)
    batcher = ContinuousBatcher(family, slots=1)
    for layer in batcher._decoder._layers:  # type: ignore[attr-defined]
        layer._kept = torch.full_like(layer._kept, float("nan"))
    batcher.add(client.sequence())
    while batcher.step():
        pass
    assert client.matches_reference(family)


def test_an_error_in_a_step_ends_its_sequences_and_not_the_batcher(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["rotary"]
    batcher, decoding, prefilling = ContinuousBatcher(family), Client([1], max_tokens=9), Client([2] * 47, max_tokens=3)
    monkeypatch.setattr(batcher._decoder, "step", lambda *_: 1 / 0)
    batcher.add(decoding.sequence(), prefilling.sequence())
    batcher.step()
    assert ([type(error) for error in decoding.ends], prefilling.ends) == ([ZeroDivisionError], [])
    monkeypatch.undo()
    while batcher.step():
        pass
    assert prefilling.matches_reference(family)
    assert prefilling.ends == [None]


def test_an_error_in_a_step_caused_by_one_sequence_ends_only_this_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    family, bad = FAMILIES["rotary"], VOCAB - 1

    def others() -> list[Client]:
        return [Client([token], seed=token, max_tokens=20, logit_bias={bad: -100}) for token in range(5)]

    batcher, clients, broken = ContinuousBatcher(family), others(), Client([bad])
    step = batcher._decoder.step
    monkeypatch.setattr(
        batcher._decoder, "step", lambda tokens, places: 1 / 0 if bad in tokens else step(tokens, places)
    )
    batcher.add(
        *(client.sequence() for client in clients[:3]),
        broken.sequence(),
        *(client.sequence() for client in clients[3:]),
    )
    while batcher.step():
        pass
    assert [type(error) for error in broken.ends] == [ZeroDivisionError]
    assert [client.tokens for client in clients] == answers(family, others())


def test_an_error_outside_of_a_sequence_ends_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher, clients = ContinuousBatcher(FAMILIES["rotary"], slots=1), [Client([1], max_tokens=3) for _ in range(2)]
    monkeypatch.setattr(batcher, "_admit", lambda: 1 / 0)
    batcher.add(*(client.sequence() for client in clients))
    batcher.close()
    run(batcher).join(20)
    assert [[type(error) for error in client.ends] for client in clients] == [[ZeroDivisionError]] * 2


def run(batcher: ContinuousBatcher) -> threading.Thread:
    thread = threading.Thread(target=batcher.run, daemon=True)
    thread.start()
    return thread
