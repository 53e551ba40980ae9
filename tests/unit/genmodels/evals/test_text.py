"""The evaluation of texts: count tables by hand, copied passages, repetition, and the metrics of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from genmodels.data import DataConfig, TextData, open_dataset
from genmodels.declarations.minigpt import MiniGPTConfig
from genmodels.evals.text import longest_shared, ngram_losses, repetition, write
from genmodels.family import OptimizerConfig, TextInfo
from genmodels.models.minigpt import MiniGPT, MiniGPTDecoder
from genmodels.nn.sampling import SamplingOptions
from genmodels.registry.store import Registry
from genmodels.runs.store import Run
from genmodels.sizing.memory import SERVED_ROWS
from genmodels.storage import open_storage
from genmodels.training.attempt import run_attempt
from genmodels.training.group import Group
from genmodels.training.loop import evaluate
from services.local.platform import submit
from services.train.publish import publish_run
from tests.support.evaluation_data import Bench
from tests.support.paths import ROOT
from tests.support.spec_files import read_spec
from tests.support.tiny_jobs import job, make_data, model

WORDS = ("the", "king", "of", "storm", "and", "night", "my", "lord", "sleeps", "no", "more")


def story(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def trained(data: TextData, steps: int) -> MiniGPT:
    torch.manual_seed(0)
    config = MiniGPTConfig(n_embd=32, n_layer=2, n_head=2, block_size=16)
    family = MiniGPT(config, TextInfo(vocab_size=data.info.vocab_size))
    (role,) = family.roles(OptimizerConfig(learning_rate=1e-2))
    windows = data.split("train", 16)
    for step in range(steps):
        index = np.arange(32) * 7 + step * 31
        batch = windows.take(index % len(windows), np.zeros_like(index))
        role.loss({name: torch.from_numpy(part) for name, part in batch.items()}, torch.tensor(0.0))["loss"].backward()
        for optimizer in role.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return family


# the whole evaluation


@pytest.mark.slow
def test_a_model_stands_beside_tables_and_people() -> None:
    data = TextData(story(6000, 0))
    family, bench = trained(data, 150), Bench()
    result = family.evaluate(bench.evaluation_data(data))
    assert set(result.metrics) == set(MiniGPT.evaluation_names)
    loss = result.metrics["loss"]
    exact = evaluate(family, data.split("val", 16), Group())
    assert loss.value == pytest.approx(exact["val_loss"])
    assert result.metrics["bits_per_token"].value == pytest.approx(exact["val_bits_per_char"])
    assert loss.baselines["table of 4-grams"] == pytest.approx(
        ngram_losses(data.train, data.val, 4, data.info.vocab_size).mean()
    )
    below = result.metrics["nats_below_bigrams"].value
    assert below == pytest.approx(loss.baselines["table of bigrams"] - loss.value)
    assert below > 0.1
    assert result.metrics["longest_copied"].baselines["val"] >= 10
    assert 0 < result.metrics["repetition"].value < 1
    assert result.notes["samples"] == 16
    assert bench.reports > 400
    assert family.evaluate(bench.evaluation_data(data)) == result
    assert len(bench.made) == 3  # count tables, once


def test_the_second_half_is_by_position() -> None:
    easy = TextData(story(3000, 0) + " king" * 80)  # the end of val is one word again and again
    result = trained(easy, 40).evaluate(Bench().evaluation_data(easy))
    metrics = result.metrics
    assert metrics["second_half_loss"].baselines["table of 4-grams"] < metrics["loss"].baselines["table of 4-grams"]


def test_a_model_that_learned_nothing_is_above_every_table() -> None:
    data = TextData(story(2000, 0))
    metrics = trained(data, 0).evaluate(Bench().evaluation_data(data)).metrics
    assert metrics["nats_below_4grams"].value < metrics["nats_below_bigrams"].value < 0


@pytest.mark.slow
def test_what_is_copied_is_found() -> None:
    """A model that has memorised one passage writes it."""
    data = TextData("ring around the rosy, pockets full of posies. " * 120)
    metrics = trained(data, 150).evaluate(Bench().evaluation_data(data)).metrics
    assert metrics["longest_copied"].value == 400
    assert metrics["repetition"].value > 0.8


def test_a_short_val_has_losses_and_no_samples() -> None:
    data = TextData(story(450, 0))
    assert len(data.val) < 416
    metrics = trained(data, 5).evaluate(Bench().evaluation_data(data)).metrics
    assert "loss" in metrics
    assert "repetition" not in metrics


@pytest.mark.parametrize("prompt", [4, 16, 21])
def test_samples_are_those_of_the_plain_reference(prompt: int) -> None:
    """Also when the window has moved on, and for more samples than a host has rows."""
    data = TextData(story(1500, 0))
    family, bench = trained(data, 10), Bench()
    prompts = [data.val[at : at + prompt].tolist() for at in range(SERVED_ROWS + 2)]
    samples = write(family, prompts, 40, bench.evaluation_data(data))
    options = SamplingOptions(max_tokens=40)
    assert samples.tolist() == [list(family.generate(one, seed, options)) for seed, one in enumerate(prompts)]


def test_a_sample_reads_each_token_once() -> None:
    """The cost of a sample is a step for each token, and a window only where the window moves on."""
    data = TextData(story(1500, 0))
    family = trained(data, 0)
    decoder = CountingDecoder(family.decoder(2))
    family.decoder = lambda slots: decoder
    write(family, [data.val[:4].tolist(), data.val[4:8].tolist()], 40, Bench().evaluation_data(data))
    # 4 + 12 tokens fill the window of 16; from then on each 9th token reads 8 tokens anew
    assert decoder.prefilled == [4, 4, *[8] * 6]
    assert decoder.steps == 40 - 4


class CountingDecoder:
    def __init__(self, decoder: MiniGPTDecoder) -> None:
        self.decoder, self.chunk = decoder, decoder.chunk
        self.steps, self.prefilled = 0, list[int]()

    def step(self, tokens: Sequence[int | None], positions: Sequence[int]) -> torch.Tensor:
        self.steps += 1
        return self.decoder.step(tokens, positions)

    def prefill(self, slot: int, tokens: Sequence[int], start: int) -> torch.Tensor:
        self.prefilled.append(len(tokens))
        return self.decoder.prefill(slot, tokens, start)


# count tables


def ngram_loss(train: np.ndarray, val: np.ndarray, n: int, vocab_size: int) -> float:
    return float(ngram_losses(train, val, n, vocab_size).mean())


def test_unigram_loss_is_what_it_is_by_hand() -> None:
    # counts 2 and 1: discount 1 / (1 + 2 * 1) = 1/3, shared over two symbols: probabilities 2/3 and 1/3
    losses = ngram_losses(np.array([0, 0, 1]), np.array([1, 0, 1, 1]), 1, 2)
    assert losses == pytest.approx([-math.log(2 / 3), -math.log(1 / 3), -math.log(1 / 3)])


def test_bigram_loss_is_what_it_is_by_hand() -> None:
    # 0,0,0,1: bigrams 00 twice, 01 once: discount 1/3. Continuations: 0 after one symbol, 1 after one: discount 1,
    # so the lower order is uniform, 1/2 each. P(0|0) = (2 - 1/3 + 1/3 * 2 * 1/2) / 3 = 2/3.
    assert ngram_loss(np.array([0, 0, 0, 1]), np.array([0, 0]), 2, 2) == pytest.approx(-math.log(2 / 3))
    assert ngram_loss(np.array([0, 0, 0, 1]), np.array([1, 0]), 2, 2) == pytest.approx(math.log(2))  # nothing follows 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_probabilities_of_the_count_table_sum_to_one(n: int) -> None:
    train = np.random.default_rng(0).integers(0, 4, 60)
    for before in [(0, 1), (3, 3), (4, 4), (2, 4)]:  # symbol 4 is never seen
        known = ngram_loss(train, np.array(before), n, 5)
        after = [2 * ngram_loss(train, np.array([*before, symbol]), n, 5) - known for symbol in range(5)]
        assert sum(math.exp(-loss) for loss in after) == pytest.approx(1)


def test_tables_of_tiny_shakespeare() -> None:
    folder = os.environ.get("GENMODELS_DATA")
    if not folder or not Path(folder, "tiny-shakespeare", "input.txt").exists():
        pytest.skip("GENMODELS_DATA names no folder with tiny-shakespeare/input.txt")
    data = open_dataset(DataConfig(dataset="tiny-shakespeare"))
    assert isinstance(data, TextData)
    losses = [round(ngram_loss(data.train, data.val, n, 65), 3) for n in (1, 2, 3, 4, 5)]
    assert losses == [3.347, 2.484, 2.045, 1.729, 1.579]


# what is copied, what is repeated


@pytest.mark.parametrize("vocab_size", [2, 5, 300, 60_000])
def test_the_longest_shared_passage_is_that_of_trying_all(vocab_size: int) -> None:
    random = np.random.default_rng(vocab_size)
    kind = np.min_scalar_type(vocab_size - 1)
    for _ in range(10):
        source = random.integers(0, min(vocab_size, 6), 120).astype(kind)
        passages = random.integers(0, min(vocab_size, 6), (3, 20)).astype(kind)
        passages[1, 4:15] = source[60:71]
        expected = max(
            stop - start
            for passage in passages.tolist()
            for start in range(20)
            for stop in range(start + 1, 21)
            if any(source[at : at + stop - start].tolist() == passage[start:stop] for at in range(120))
        )
        assert expected >= 11
        assert longest_shared(passages, source, vocab_size) == expected


def test_nothing_and_everything_shared() -> None:
    assert longest_shared(np.array([[1, 2, 3]]), np.array([4, 5, 6, 7]), 8) == 0
    assert longest_shared(np.array([[4, 5, 6]]), np.array([3, 4, 5, 6]), 8) == 3
    assert longest_shared(np.array([[1, 2], [3, 4]]), np.array([1, 2, 3, 4]), 8) == 2  # passages are not one text


def test_repetition_is_what_it_is_by_hand() -> None:
    assert repetition(np.array([[1, 2, 3, 4, 5]]), 2) == 0
    assert repetition(np.array([[1, 2, 1, 2, 1]]), 2) == 0.5  # 12 21 12 21
    assert repetition(np.array([[1, 1, 1], [1, 2, 3]]), 2) == 0.25  # within a passage only


# gates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shipped", "name", "metric"),
    [
        ("study-improved", "improved-1", "nats_below_4grams"),
        ("quickstart", "minigpt-shakespeare", "nats_below_bigrams"),
    ],
)
def test_a_model_that_lost_to_the_table_is_refused(tmp_path: Path, shipped: str, name: str, metric: str) -> None:
    """The shipped gate, and a run that was given four steps."""
    spec = next(model for model in read_spec(ROOT / "jobs" / f"{shipped}.yaml").models if model.name == name)
    entry = model(make_data(tmp_path), "minigpt", name, max_steps=4, save_every=4)
    entry["serve"] = spec.serve.model_dump()
    storage = open_storage((tmp_path / "storage").as_uri())
    work = job("hopeless", entry)
    run = Run(storage, submit(storage, work), name)
    assert run_attempt(storage, run.job, name, 1, Group())
    result = publish_run(run, work.models[0], 1)
    assert (result.outcome, result.cause, result.version) == ("failed", "gate", None)
    assert result.message.startswith(f"not published: {metric} -")
    assert Registry(storage).models() == []


def test_the_study_has_no_gate() -> None:
    assert all(model.serve.gate is None for model in read_spec(ROOT / "jobs" / "study.yaml").models)
