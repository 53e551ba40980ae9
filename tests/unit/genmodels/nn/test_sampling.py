"""The choice of tokens."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from genmodels.errors import RequestError
from genmodels.nn.sampling import Sampler, SamplingOptions, choose, uniform


def test_random_numbers_are_the_same_in_every_process() -> None:
    assert uniform(0, 0) == 0.4688827717341759
    assert uniform(-3, 1) == 0.6779288929576133
    draws = torch.tensor([uniform(seed, index) for seed in range(40) for index in range(50)], dtype=torch.float64)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(draws.unique()) == 2000
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(draws.var()) == pytest.approx(1 / 12, abs=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.1, 0.25, 0.15]),
        ({"temperature": 0.5}, [0.7246, 0.0290, 0.1812, 0.0652]),
        ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 9}, [0.5, 0.1, 0.25, 0.15]),
        ({"top_p": 0.8}, [5 / 9, 0, 2.5 / 9, 1.5 / 9]),  # the fewest that make up 0.8: 0.5 + 0.25 + 0.15
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"min_p": 0.4}, [2 / 3, 0, 1 / 3, 0]),
        ({"logit_bias": {1: math.log(5), 0: -100}}, [0, 5 / 9, 2.5 / 9, 1.5 / 9]),
    ],
)
def test_tokens_come_as_often_as_they_are_probable(options: dict[str, float], expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
    request = SamplingOptions.model_validate({"temperature": 1.0, **options})
    sampler = Sampler(request, 0, [], 4)
    counts = Counter(choose(logits[None], [sampler])[0] for _ in range(2000))
    for token, probability in enumerate(expected):
        assert counts[token] / 2000 == pytest.approx(probability, abs=0.03 if probability else 0)


def test_penalties_change_logits_as_they_are_defined() -> None:
    options = SamplingOptions(repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(options, 0, [0, 1], 5)
    for token in (2, 2, 3):
        sampler.accept(token)
    logits = torch.tensor([1.0, -1.0, 4.0, -4.0, 3.0], dtype=torch.float64)
    # prompt: repetition only; the answer's: 4 / 2 - 2 * 0.25 - 0.5 and -4 * 2 - 0.25 - 0.5
    assert sampler.adjust(logits).tolist() == [0.5, -2.0, 1.0, -8.75, 3.0]


def test_a_row_is_chosen_from_without_regard_to_the_others() -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 65) * 3
    settings = [
        SamplingOptions(temperature=t, top_k=k, top_p=p, min_p=m)
        for t, k in ((0, None), (0.8, 5))
        for p in (1, 0.9)
        for m in (0, 0.05)
    ] * 2
    together = choose(logits, [Sampler(options, seed, [], 65) for seed, options in enumerate(settings)])
    alone = [choose(logits[i : i + 1], [Sampler(options, i, [], 65)])[0] for i, options in enumerate(settings)]
    assert together == alone


def test_a_bias_on_a_token_that_there_is_not_is_refused() -> None:
    with pytest.raises(RequestError, match="logit_bias: token 65 does not exist; this model's are 0 to 64") as error:
        Sampler(SamplingOptions(logit_bias={3: 1, 65: 1}), 0, [], 65)
    assert error.value.param == "logit_bias"


def test_token_ids_are_text_in_json() -> None:
    assert SamplingOptions.model_validate({"logit_bias": {"3": 1, "0": -100}}).logit_bias == {3: 1, 0: -100}
    for key in ("-1", "01", "1.0", "", "\u0661", "x"):
        with pytest.raises(ValidationError, match="expected the id of a token"):
            SamplingOptions.model_validate({"logit_bias": {key: 1}})


def test_a_sampler_that_fails_leaves_all_as_they_were() -> None:
    samplers = [Sampler(SamplingOptions(presence_penalty=1), seed, [], 5) for seed in range(3)]
    samplers[1].adjust = lambda _: torch.zeros(6)
    with pytest.raises(RuntimeError):
        choose(torch.zeros(3, 5), samplers)
    assert [sampler.count for sampler in samplers] == [0, 0, 0]
    assert not any(sampler._written.any() for sampler in samplers)
