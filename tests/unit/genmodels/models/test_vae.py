"""The variational autoencoder: its bound, its schedules, its latents."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Independent, Normal, kl

from genmodels.declarations.vae import VAEConfig
from genmodels.errors import RequestError, SpecError
from genmodels.family import ImageInfo, OptimizerConfig, TextInfo
from genmodels.models.vae import VAE, VAERequest, kl_divergence, kl_weight
from genmodels.nn.networks import psnr
from tests.support.image_training import blobs, train

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 40, 24)]
LIKELIHOODS = ["bernoulli", "bernoulli-binarized", "gaussian"]
REQUEST = VAERequest()


def tiny(shape=(1, 12, 8), **settings) -> VAE:
    torch.manual_seed(0)
    channels, height, width = shape
    return VAE(
        VAEConfig(**{"latent_dim": 5, "width": 4, **settings}), ImageInfo(channels=channels, height=height, width=width)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_verb_answers_in_shape_and_range(shape, likelihood) -> None:
    model = tiny(shape, likelihood=likelihood)
    images = blobs(6, shape)
    model.network.train()
    latents = model.encode(images)
    assert latents.shape == (6, 5)
    assert model.latent_dim == 5
    pictures = {"decode": model.decode(latents, REQUEST), **model.preview({"images": images}, seed=0)}
    assert set(pictures) == {"decode", "samples", "reconstructions"}
    for name, picture in pictures.items():
        assert picture.shape == images.shape, name
        assert picture.dtype == torch.float32, name
        assert 0 <= picture.min() <= picture.max() <= 1, name
    path = model.interpolate(latents[0], latents[1], 4)
    assert path.shape == (4, 5)
    assert path[0] == pytest.approx(latents[0], abs=1e-5)
    assert path[-1] == pytest.approx(latents[1], abs=1e-5)
    assert model.verbs == {"generate", "encode", "decode", "reconstruct", "interpolate"}
    assert model.network.training, "answering must not disturb the training loop"


def test_kl_equals_that_of_torch() -> None:
    mean, log_variance = torch.randn(7, 5), torch.randn(7, 5)
    expected = kl.kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)
    assert kl_divergence(torch.zeros(1, 5), torch.zeros(1, 5)).abs().max() == 0


def test_reconstruction_is_the_negative_log_likelihood() -> None:
    logits, greys = torch.randn(4, 1, 12, 8), blobs(4)
    binary = greys.round()
    expected = -Independent(Bernoulli(logits=logits), 3).log_prob(binary)
    torch.testing.assert_close(tiny(likelihood="bernoulli-binarized").network.nll(logits, binary), expected)

    torch.testing.assert_close(
        tiny().network.nll(logits, greys),
        F.binary_cross_entropy(logits.sigmoid(), greys, reduction="none").sum((1, 2, 3)),
    )

    network = tiny(likelihood="gaussian").network
    expected = -Independent(Normal(logits.sigmoid(), network.log_std.exp()), 3).log_prob(greys)
    torch.testing.assert_close(network.nll(logits, greys), expected)


def test_warm_up_rises_to_beta_and_stays() -> None:
    config = VAEConfig(beta=2.0, kl_warmup=0.4)
    weights = [float(kl_weight(config, torch.tensor(progress))) for progress in (0.0, 0.1, 0.2, 0.4, 1.0)]
    assert weights == pytest.approx([0, 0.5, 1, 2, 2])
    assert float(kl_weight(VAEConfig(beta=0.7, kl_warmup=0.0), torch.tensor(0.0))) == pytest.approx(0.7)


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.0), (0.25, 0.75), (1.0, 1.5)])
def test_loss_is_reconstruction_plus_weighted_kl(progress, weight) -> None:
    (role,) = tiny(beta=1.5, kl_warmup=0.5).roles(OptimizerConfig())
    losses = role.loss({"images": blobs(4)}, torch.tensor(progress))
    assert float(losses["loss"].detach()) == pytest.approx(
        float(losses["reconstruction"] + weight * losses["kl"]), rel=1e-6
    )
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_free_bits_charge_at_least_their_amount_per_latent() -> None:
    model = tiny(free_bits=2.0, kl_warmup=0.0)
    (role,) = model.roles(OptimizerConfig())
    images = blobs(4)
    torch.manual_seed(1)
    losses = role.loss({"images": images}, torch.tensor(1.0))
    with torch.no_grad():
        mean, log_variance = model.network.posterior(images)
    parts = kl_divergence(mean, log_variance).mean(0)
    assert float(losses["kl"]) == pytest.approx(float(parts.sum()), rel=1e-5)  # the true one is what is logged
    charged = sum(max(2.0, float(part)) for part in parts)
    assert charged > float(parts.sum())
    assert float(losses["loss"].detach() - losses["reconstruction"]) == pytest.approx(charged, rel=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_falls_and_every_parameter_learns(likelihood) -> None:
    model = tiny(likelihood=likelihood)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    rows = train(model, 40)
    assert set(rows[0]) == {"loss", "reconstruction", "kl"}
    assert sum(row["reconstruction"] for row in rows[-5:]) < sum(row["reconstruction"] for row in rows[:5]) - 5
    assert [name for name, value in model.network.state_dict().items() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_is_float32_under_autocast_and_repeatable(likelihood) -> None:
    model = tiny(likelihood=likelihood)
    (role,) = model.roles(OptimizerConfig())
    result = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            losses = role.loss({"images": blobs(4)}, torch.tensor(0.5))
        model.network.zero_grad()
        losses["loss"].backward()
        result.append([losses["loss"].detach().clone(), *(p.grad.clone() for p in model.network.parameters())])
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(torch.equal(a, b) for a, b in zip(*result, strict=True))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_metrics_equal_the_direct_computation(likelihood) -> None:
    model = tiny(likelihood=likelihood)
    train(model, 10)
    images = blobs(10)
    state = torch.get_rng_state()
    parts = [model.eval_step({"images": part}) for part in (images[:4], images[4:])]
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not touch the global RNG"
    assert all(value.dtype == torch.float64 for value in parts[0].values())
    metrics = model.eval_metrics({name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert set(metrics) == set(model.metric_names)
    assert metrics["val_loss"] == pytest.approx(metrics["val_reconstruction"] + metrics["val_kl"])

    if likelihood == "bernoulli-binarized":
        return  # the encoder saw drawn pixels, which only `measure` knows
    means = model.encode(images)
    assert metrics["val_psnr"] == pytest.approx(float(psnr(model.decode(means, REQUEST), images).mean()), rel=1e-4)
    assert metrics["val_active_units"] == float((means.double().var(0, unbiased=False) > 0.01).sum())
    with torch.no_grad():
        mean, log_variance = model.network.posterior(images)
        draws = [mean + torch.randn_like(mean) * (0.5 * log_variance).exp() for _ in range(200)]
        nll = torch.stack([model.network.nll(model.network.decoder(latents), images).mean() for latents in draws])
    assert metrics["val_kl"] == pytest.approx(float(kl_divergence(mean, log_variance).sum(1).mean()), rel=1e-4)
    assert abs(metrics["val_reconstruction"] - float(nll.mean())) < 5 * float(nll.std())


def test_unused_latents_are_not_active() -> None:
    model = tiny()
    n = 8
    means = torch.randn(n, 5, dtype=torch.float64) * torch.tensor([1, 1, 0.05, 0.01, 0])
    sums = {name: torch.tensor(float(n)) for name in ("images", "reconstruction", "kl", "psnr")}
    metrics = model.eval_metrics({**sums, "means": means.sum(0), "square_means": means.square().sum(0)})
    assert metrics["val_active_units"] == 2


def test_priors_and_temperature() -> None:
    model = tiny()
    standard = model.sample_latents(6, 3, REQUEST)
    assert torch.equal(standard, model.sample_latents(6, 3, VAERequest(prior="standard")))
    assert torch.equal(model.sample_latents(2, 3, REQUEST), standard[:2])
    assert torch.equal(model.sample_latents(6, 3, VAERequest(temperature=0.5)), standard * 0.5)
    with pytest.raises(RequestError, match="no fitted prior"):
        model.sample_latents(1, 0, VAERequest(prior="fitted"))

    model.fit([{"images": blobs(40)}], seed=0)
    fitted = model.sample_latents(6, 3, REQUEST)
    assert torch.equal(fitted, model.sample_latents(6, 3, VAERequest(prior="fitted")))
    assert torch.equal(model.sample_latents(2, 3, REQUEST), fitted[:2])
    assert not torch.isin(fitted, standard).any()
    other = tiny()
    other.load_assets(model.assets())
    assert torch.equal(other.sample_latents(6, 3, REQUEST), fitted)


def test_fitted_prior_covers_draws_not_only_means() -> None:
    model = tiny()
    with torch.no_grad():
        head = model.network.encoder.head[-1]
        head.weight.zero_()
        head.bias.copy_(torch.tensor([3.0] * 5 + [2 * math.log(0.7)] * 5))  # every posterior is N(3, 0.7^2)
    model.fit([{"images": blobs(2000)}], seed=0)
    sample = model.sample_latents(2000, 0, REQUEST)
    assert sample.mean(0) == pytest.approx([3] * 5, abs=0.1)
    assert sample.std(0) == pytest.approx([0.7] * 5, abs=0.05)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({}, TextInfo(vocab_size=9), "data: vae learns from images, but this dataset has texts"),
        (
            {"latent_dim": 65},
            ImageInfo(channels=1, height=8, width=8),
            "model.latent_dim: 65 is more than the 64 numbers",
        ),
    ],
)
def test_what_cannot_work_is_refused(config, data, message) -> None:
    with pytest.raises(SpecError, match=message):
        VAE.check(VAEConfig(**config), data)
