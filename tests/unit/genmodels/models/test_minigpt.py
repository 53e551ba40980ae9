from __future__ import annotations

import math
import re
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from genmodels.declarations.minigpt import MiniGPTConfig
from genmodels.errors import RequestError, SpecError
from genmodels.family import ImageInfo, OptimizerConfig, TextInfo
from genmodels.models.minigpt import MiniGPT
from genmodels.nn.optim import make_optimizers
from genmodels.nn.sampling import SamplingOptions
from genmodels.spec.sections import ModelSpec
from tests.support.paths import ROOT
from tests.support.spec_files import read_spec

VOCAB = 11
PLAIN: dict[str, Any] = {
    "positions": "learned",
    "norm": "layer",
    "mlp": "relu",
    "qk_norm": False,
    "tied_head": False,
    "bias": True,
}
SMALL: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "block_size": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "modern": {},
    "plain": PLAIN,
    "gelu-tied": {"mlp": "gelu", "tied_head": True},
    "dropout-layer-norm": {"dropout": 0.1, "norm": "layer", "bias": True},
}
variants = pytest.mark.parametrize("switches", VARIANTS.values(), ids=list(VARIANTS))


def build(vocab_size: int = VOCAB, **settings: Any) -> MiniGPT:
    torch.manual_seed(0)
    return MiniGPT(MiniGPTConfig.model_validate({**SMALL, **settings}), TextInfo(vocab_size=vocab_size))


def lively(**settings: Any) -> MiniGPT:
    """Return a model whose predictions differ from token to token, as after training."""
    family = build(**settings)
    with torch.no_grad():
        for parameter in family.network.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return family


def corpus(n: int = 16, length: int = 8) -> dict[str, Tensor]:
    """Return windows of one repeated passage: the next token follows from the last two."""
    passage = torch.tensor([0, 1, 2, 3, 1, 4, 5, 6, 4, 7, 8, 9, 10, 8, 2]).repeat(4)
    windows = torch.stack([passage[start : start + length + 1] for start in range(n)])
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def train(family: MiniGPT, steps: int, config: OptimizerConfig) -> list[float]:
    (role,) = family.roles(config)
    batch, losses = corpus(length=family.block_size), []
    for step in range(steps):
        role.loss.train()
        loss = role.loss(batch, torch.tensor(step / steps))["loss"]
        loss.backward()
        for optimizer in role.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# architecture


STUDY, IMPROVED, SEEDS = (
    read_spec(ROOT / "jobs" / f"{name}.yaml").models for name in ("study", "study-improved", "study-seeds")
)


def test_parameters_of_the_study_are_those_of_the_lecture() -> None:
    # embeddings; 4 blocks of norms, queries keys values, output, mlp; last norm; head
    blocks = 4 * (4 * 64 + 3 * 64 * 64 + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64))
    expected = 65 * 64 + 32 * 64 + blocks + 2 * 64 + (64 * 65 + 65)
    assert expected == 209_729  # what the lecture's notebook prints
    family = MiniGPT(cast(MiniGPTConfig, STUDY[0].model), TextInfo(vocab_size=65))
    assert sum(parameter.numel() for parameter in family.network.parameters()) == expected


def test_the_study_is_as_published() -> None:
    names = ("n_embd", "n_layer", "n_head", "block_size", "batch_size", "learning_rate", "dropout", "max_steps")
    result = [{**test.model.model_dump(), **test.train.model_dump()} for test in STUDY]
    assert [tuple(test[name] for name in names) for test in result] == [
        (64, 4, 4, 32, 16, 1e-3, 0, 5_000),
        (64, 4, 4, 32, 16, 1e-3, 0, 15_000),
        (128, 6, 4, 64, 32, 2e-3, 0.1, 5_000),
        (128, 8, 8, 256, 32, 3e-3, 0.2, 5_000),
        (128, 8, 8, 256, 64, 4e-3, 0.2, 7_000),
    ]
    plain = {**PLAIN, "optimizer": "adamw", "betas": (0.9, 0.999), "schedule": "constant", "ema": None}
    assert all(test | plain == test for test in result)


def test_the_improved_study_has_no_larger_budget() -> None:
    for plain, better in zip(STUDY, IMPROVED, strict=True):
        (tokens, size), (tokens_before, size_before) = budget(better), budget(plain)
        assert tokens <= tokens_before
        assert size <= size_before
        assert better.data == plain.data


def test_seeds_of_the_improved_study_differ_in_nothing_else() -> None:
    wanted = [(test, seed) for test in IMPROVED[:2] for seed in (1, 2)]
    for result, (test, seed) in zip(SEEDS, wanted, strict=True):
        named = {"name": f"{test.name}-seed-{seed}", "train": {**test.train.model_dump(), "seed": seed}}
        assert result.model_dump() == {**test.model_dump(), **named}


def budget(spec: ModelSpec) -> tuple[int, int]:
    """Return the number of training tokens and of parameters."""
    config = cast(MiniGPTConfig, spec.model)
    network = MiniGPT(config, TextInfo(vocab_size=65)).network
    tokens = spec.train.max_steps * spec.train.batch_size * config.block_size
    return tokens, sum(parameter.numel() for parameter in network.parameters())


@variants
def test_the_first_loss_is_that_of_guessing(switches: dict[str, Any]) -> None:
    family = build(**switches)
    assert family.eval_metrics(family.eval_step(corpus()))["val_loss"] == pytest.approx(math.log(VOCAB), abs=0.05)


@variants
def test_later_tokens_change_no_earlier_logits(switches: dict[str, Any]) -> None:
    family = lively(**switches)
    tokens = torch.randint(VOCAB, (3, 8))
    before = family.logits(tokens)
    for position in range(1, 8):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = family.logits(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


def test_positions_count() -> None:
    """Without positions a block sees a set: a swap of two early tokens would not change the last output."""
    for positions in ("learned", "rotary"):
        family = lively(positions=positions, n_layer=1)
        one, other = family.logits(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
        assert not torch.allclose(one, other, atol=1e-3)


def test_swiglu_has_as_many_weights_as_the_other_mlps() -> None:
    networks = [build(n_embd=48, mlp=mlp).network for mlp in ("swiglu", "gelu", "relu")]
    assert len({sum(parameter.numel() for parameter in network.parameters()) for network in networks}) == 1


def test_a_tied_head_is_stored_once() -> None:
    tied, untied = build(tied_head=True).network, build().network
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head.weight"}


# training


@variants
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls(switches: dict[str, Any], optimizer: str) -> None:
    family = build(**switches)
    losses = train(family, 60, OptimizerConfig.model_validate({"optimizer": optimizer, "learning_rate": 1e-2}))
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert (
        family.eval_metrics(family.eval_step(corpus()))["val_loss"] < 0.7
    )  # the first token of a window cannot be known


def test_bf16_autocast_gives_nearly_the_same_loss() -> None:
    (role,) = lively(n_embd=32).roles(OptimizerConfig())
    exact = role.loss(corpus(), torch.tensor(0.0))["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = role.loss(corpus(), torch.tensor(0.0))["loss"]
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(rounded, list(role.loss.parameters())))


@pytest.mark.parametrize("switches", [{"dropout": 0.1}, PLAIN], ids=["modern", "plain"])
def test_compiles_as_one_graph(switches: dict[str, Any]) -> None:
    (role,) = build(**switches).roles(OptimizerConfig())
    role.loss.eval()
    expected = role.loss(corpus(), torch.tensor(0.0))["loss"]
    compiled = torch.compile(role.loss, fullgraph=True, backend="eager")  # needs no C compiler
    assert torch.allclose(compiled(corpus(), torch.tensor(0.0))["loss"], expected)


# evaluation


def test_measure_adds_up_and_skips_padding() -> None:
    family, batch = lively(), corpus()
    whole = family.eval_step(batch)
    parts = [family.eval_step({name: part[rows] for name, part in batch.items()}) for rows in (slice(5), slice(5, 16))]
    assert whole["nll"].dtype == torch.float64
    assert whole["tokens"] == 16 * 8
    assert torch.allclose(parts[0]["nll"] + parts[1]["nll"], whole["nll"], rtol=1e-6)

    logits = family.logits(batch["tokens"]).log_softmax(-1)
    by_hand = -logits.gather(-1, batch["targets"][..., None]).squeeze(-1)
    targets = batch["targets"].clone()
    targets[2:, 3:] = -1
    padded = family.eval_step({"tokens": batch["tokens"], "targets": targets})
    assert padded["tokens"] == 2 * 8 + 14 * 3
    assert float(padded["nll"]) == pytest.approx(float(by_hand[targets != -1].sum()), rel=1e-5)

    metrics = family.eval_metrics(padded)
    assert tuple(metrics) == family.metric_names
    assert metrics["val_bits_per_char"] == pytest.approx(metrics["val_loss"] / math.log(2))


@pytest.mark.parametrize("training", [True, False])
def test_using_a_model_leaves_its_mode_and_does_not_drop_out(training: bool) -> None:
    family = lively(dropout=0.5)
    family.network.train(training)
    assert torch.equal(family.logits(torch.tensor([[1, 2]])), family.logits(torch.tensor([[1, 2]])))
    family.eval_step(corpus())
    answer = family.generate([1], 0, SamplingOptions(max_tokens=5))
    next(answer)
    assert family.network.training is training  # also in the middle of an answer
    (role,) = family.roles(OptimizerConfig())
    role.loss(corpus(), torch.tensor(0.0))["loss"].backward()  # nothing the network keeps is an inference tensor


# generation


def test_an_answer_depends_on_its_arguments_alone() -> None:
    family, request = lively(), SamplingOptions(max_tokens=30, temperature=1.0)
    torch.manual_seed(1)
    first = list(family.generate([1, 2], 5, request))
    torch.manual_seed(2)
    assert list(family.generate([1, 2], 5, request)) == first
    assert list(family.generate([1, 2], 6, request)) != first
    assert list(family.generate([1, 2], 5, request.model_copy(update={"max_tokens": 7}))) == first[:7]
    assert len(first) == 30
    assert set(first) <= set(range(VOCAB))


def test_temperature_zero_takes_the_most_probable_token() -> None:
    family = lively(block_size=16)
    answer = list(family.generate([3], 0, SamplingOptions(max_tokens=15, temperature=0)))
    sequence = torch.tensor([[3, *answer]])
    assert family.logits(sequence[:, :-1])[0].argmax(-1).tolist() == answer
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}):
        assert list(family.generate([3], 9, SamplingOptions.model_validate({"max_tokens": 15, **options}))) == answer


@pytest.mark.parametrize("prompt_length", [1, 8, 9, 30])
def test_a_full_window_goes_on_with_its_last_half(prompt_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    family = lively()
    seen: list[list[int]] = []
    plain = family.logits

    def watched(tokens: Tensor) -> Tensor:
        seen.append(tokens[0].tolist())
        return plain(tokens)

    monkeypatch.setattr(family, "logits", watched)
    prompt = [token % VOCAB for token in range(prompt_length)]
    text = prompt + list(family.generate(prompt, 0, SamplingOptions(max_tokens=20)))

    length = prompt_length if prompt_length <= 8 else 4
    for end, window in enumerate(seen, start=prompt_length):
        assert window == text[end - length : end]
        length = length + 1 if length < 8 else 4


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one character") as error:
        next(build().generate([], 0, SamplingOptions()))
    assert (error.value.param, error.value.status) == ("prompt", 400)


# settings


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"n_embd": 100, "n_head": 8}, "n_embd", "got 100, expected a multiple of n_head.*write 96 or 112$"),
        ({"n_embd": 36, "n_head": 4}, "n_embd", "heads have an even size.*write 32 or 40$"),
        ({"n_embd": 3, "n_head": 4, "positions": "learned"}, "n_embd", "write 4$"),
        ({"n_head": 3}, "n_embd", "write 126 or 132$"),  # the default width does not fit either
        ({"n_head": 0}, "n_head", "greater than or equal to 1"),
        ({"block_size": 1}, "block_size", "greater than or equal to 2"),
        ({"dropout": 1.0}, "dropout", "less than 1"),
        ({"mlp": "tanh"}, "mlp", "'relu', 'gelu' or 'swiglu'"),
        ({"n_heads": 4}, "n_heads", "not permitted"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        MiniGPTConfig.model_validate(settings)
    (problem,) = error.value.errors()
    assert problem["loc"] == (field,)
    assert re.search(message, problem["msg"])


def test_odd_heads_do_with_learned_positions() -> None:
    assert MiniGPTConfig(n_embd=36, n_head=4, positions="learned").n_embd == 36


def test_images_are_no_text() -> None:
    with pytest.raises(SpecError, match="minigpt learns from text"):
        MiniGPT.check(MiniGPTConfig(), ImageInfo(channels=1, height=28, width=28))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 4097}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"stop": "x"}, "stop"),
    ],
)
def test_wrong_requests_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as error:
        SamplingOptions.model_validate(options)
    assert [problem["loc"] for problem in error.value.errors()] == [(field,)]


# optimizers


def test_weight_decay_spares_vectors() -> None:
    family = build(**PLAIN)
    (adamw,) = make_optimizers(family.network, OptimizerConfig(weight_decay=0.3, learning_rate=2e-3, betas=(0.8, 0.95)))
    decayed, spared = adamw.param_groups
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    assert all(group["lr"] == 2e-3 and group["betas"] == (0.8, 0.95) for group in adamw.param_groups)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    family = build(**PLAIN)
    (role,) = family.roles(OptimizerConfig(optimizer="muon", muon_learning_rate=0.05, weight_decay=0.1))
    muon, adamw = role.optimizers
    names = {id(parameter): name for name, parameter in family.network.named_parameters()}
    of_muon, of_adamw = (
        [names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)
    )
    assert len(of_muon) == 2 * 6
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in of_muon)
    assert {"token_embedding.weight", "position_embedding.weight", "head.weight", "norm.weight"} <= set(of_adamw)
    assert sorted(of_muon + of_adamw) == sorted(names.values())  # each once
    assert [(group["lr"], group["weight_decay"]) for group in muon.param_groups] == [(0.05, 0.1)]


def test_muon_leaves_convolutions_and_frozen_parameters() -> None:
    convolution, hidden, frozen = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(16, 8), torch.nn.Linear(8, 2)
    network = torch.nn.Sequential(convolution, torch.nn.Flatten(), hidden, frozen.requires_grad_(False))
    muon, adamw = make_optimizers(network, OptimizerConfig(optimizer="muon"))
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(8, 16)]
    assert [p.shape for group in adamw.param_groups for p in group["params"]] == [(4, 1, 3, 3), (4,), (8,)]
    assert len(make_optimizers(torch.nn.Conv2d(1, 4, 3), OptimizerConfig(optimizer="muon"))) == 1
